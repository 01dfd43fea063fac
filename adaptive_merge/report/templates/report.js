"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("scheme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const current = () => root.dataset.scheme || (system.matches ? "dark" : "light");
  const tell = () => { button.querySelector("span").textContent = current() === "dark" ? "light" : "dark"; };
  button.addEventListener("click", () => { root.dataset.scheme = current() === "dark" ? "light" : "dark"; tell(); });
  system.addEventListener("change", tell);
  tell();

  // What scrolls sideways says so, and answers to the keyboard.
  const watch = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const scrolls = target.scrollWidth > target.clientWidth + 1;
      target.toggleAttribute("data-scrolls", scrolls);
      scrolls ? target.setAttribute("tabindex", "0") : target.removeAttribute("tabindex");
    }
  });
  for (const part of document.querySelectorAll(".table, .wide .plot, pre")) {
    const cue = document.createElement("p");
    cue.className = "cue";
    cue.textContent = "more to the right: scroll sideways →";
    part.after(cue);
    watch.observe(part);
  }

  const value = (row, column) => {
    const cell = row.cells[column], raw = cell.dataset.value;
    if (raw === undefined) return cell.textContent.trim();
    return raw === "" ? null : Number(raw);
  };
  const compare = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending" || (!head.hasAttribute("aria-sort") && column > 0);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => compare(value(a, column), value(b, column), down ? -1 : 1)));
    }));
  }
})();
