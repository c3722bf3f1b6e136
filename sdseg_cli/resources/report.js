"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  document.documentElement.classList.add("js");

  // Opacity: one slider moves all layers of its kind.
  for (const slider of all("input[data-layer]")) {
    const show = () => {
      document.getElementById("gallery").style.setProperty("--" + slider.dataset.layer, slider.value / 100);
      slider.nextElementSibling.value = slider.value + " %";
    };
    slider.addEventListener("input", show);
    show(); // a browser that goes back keeps the value of a slider
  }

  // Slices: of several views of a case one is shown.
  for (const slider of all("input[data-views]")) {
    const views = all(".view", slider.closest(".case"));
    const show = () => {
      views.forEach((view, index) => { view.hidden = index !== Number(slider.value); });
      const name = views[slider.value].dataset.name;
      slider.previousElementSibling.value = name;
      slider.setAttribute("aria-valuetext", name);
    };
    slider.addEventListener("input", show);
    show();
  }

  // The case table: sorted by a header, filtered by text and by a number.
  const section = document.getElementById("cases");
  if (!section) return;
  const body = section.querySelector("tbody");
  const headers = all("thead th", section);
  const find = section.querySelector("[data-find]");
  const limit = section.querySelector("[data-limit]");
  const count = section.querySelector("[data-count]");
  const rows = [...body.rows];
  const number = (text) => (text === "\u221e" ? Infinity : /^-?[\d.]/.test(text) ? parseFloat(text) : NaN);
  const text = (row, column) => row.cells[column].textContent;

  const sort = (column, descending) => {
    const isNumeric = rows.every((row) => ["", "\u2013"].includes(text(row, column))
      || !Number.isNaN(number(text(row, column))));
    const order = (a, b) => {
      const [first, second] = [text(a, column), text(b, column)];
      if (!isNumeric) return first.localeCompare(second, undefined, { numeric: true });
      const [x, y] = [number(first), number(second)];
      return x === y ? 0 : x < y ? -1 : 1;
    };
    // What has no value stays at the end, whichever way the rest is sorted.
    const isEmpty = (row) => isNumeric && Number.isNaN(number(text(row, column)));
    const filled = rows.filter((row) => !isEmpty(row)).sort((a, b) => (descending ? order(b, a) : order(a, b)));
    body.append(...filled, ...rows.filter(isEmpty));
  };
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(column, descending);
    });
  });

  const filter = () => {
    const wanted = find.value.trim().toLowerCase();
    const most = limit && limit.value !== "" ? Number(limit.value) : null;
    let shown = 0;
    for (const row of rows) {
      const fits = row.textContent.toLowerCase().includes(wanted)
        && (most === null || number(text(row, Number(limit.dataset.limit))) <= most);
      row.hidden = !fits;
      shown += fits;
    }
    count.value = shown + " of " + rows.length;
  };
  for (const input of [find, limit]) if (input) input.addEventListener("input", filter);
  filter();
})();
