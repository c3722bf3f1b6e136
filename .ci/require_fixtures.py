"""A pytest plugin: where the fixtures are at hand, a skipped ``fixtures`` test is a failed one."""

from pathlib import Path

import pytest

_ran: set[str] = set()


def _fail(report, what):
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{what} was skipped though the fixtures folder is there: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn a skip into a failure, and note what ran."""
    report = yield
    if item.get_closest_marker("fixtures"):
        if report.skipped:
            _fail(report, item.nodeid)
        elif report.when == "call":
            _ran.add(item.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Catch a whole file that skips itself before its marks are seen."""
    report = yield
    path = getattr(collector, "path", None)
    if report.skipped and isinstance(path, Path) and "mark.fixtures" in path.read_text(encoding="utf-8"):
        _fail(report, collector.nodeid)
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """A run in which no such test ran at all proves nothing."""
    if exitstatus == pytest.ExitCode.OK and not _ran:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """Say how many comparisons were made."""
    failed = "" if _ran else ": the run counts as failed, for it proves nothing about them"
    terminalreporter.write_line(f"comparisons with the official implementation: {len(_ran)} ran{failed}")
