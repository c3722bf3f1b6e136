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
    """Turn a skip into a failure."""
    report = yield
    if item.get_closest_marker("fixtures") and report.skipped:
        _fail(report, item.nodeid)
    return report


def pytest_runtest_logreport(report):
    """Note what ran; with several processes the reports of all come to the one that counts."""
    if "fixtures" in report.keywords and report.when == "call":
        _ran.add(report.nodeid)


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
    counts = not hasattr(session.config, "workerinput")  # else one of several processes that run a part
    if counts and exitstatus == pytest.ExitCode.OK and not _ran:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """Say how many comparisons were made."""
    failed = "" if _ran else ": the run counts as failed, for it proves nothing about them"
    terminalreporter.write_line(f"comparisons with the official implementation: {len(_ran)} ran{failed}")
