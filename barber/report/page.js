"use strict";
const table = document.getElementById("results");
const body = table.tBodies[0];
const rows = [...body.rows];
const filter = document.getElementById("filter");
const panel = document.getElementById("panel");
const large = document.getElementById("large");

// A figure counts as a number, anything else as text; empty cells stay at the end in both directions.
function compare(first, second, direction) {
  const [a, b] = [first, second].map((cell) => cell.dataset.value ?? cell.textContent.trim());
  if (a === "" || b === "") return (a === "") - (b === "");
  const numbers = first.dataset.value !== undefined && second.dataset.value !== undefined;
  return direction * (numbers ? a - b : a.localeCompare(b, "en", { numeric: true }));
}

function sortBy(header) {
  const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const column = header.cellIndex;
  body.append(...[...rows].sort((a, b) => compare(a.cells[column], b.cells[column], direction)));
}

function showMatching() {
  const words = filter.value.toLowerCase().split(/\s+/);
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("shown").textContent = filter.value ? `${shown} of ${rows.length} rows` : "";
  const nothing = document.getElementById("nothing");
  nothing.hidden = shown > 0;
  nothing.querySelector("span").textContent = rows.length ? `No row has all of these words: ${filter.value}. Clear the filter to see all.` : "No run has figures yet.";
}

function open(row) {
  const content = document.getElementById(row.dataset.panel).content.cloneNode(true);
  document.getElementById("details").replaceChildren(content);
  panel.showModal();
  panel.scrollTop = 0;
}

for (const header of table.tHead.rows[0].cells) header.addEventListener("click", () => sortBy(header));
filter.addEventListener("input", showMatching);
body.addEventListener("click", (event) => {
  if (!event.target.closest("a") && !getSelection().toString()) open(event.target.closest("tr"));
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.enlarge");
  if (button) {
    large.querySelector(".picture").replaceChildren(button.querySelector("img").cloneNode());
    large.showModal();
  } else if (event.target.closest("#large .picture")) large.close();
  for (const dialog of [panel, large]) if (event.target === dialog) dialog.close();
});
showMatching();
