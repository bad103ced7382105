"use strict";
// The page is complete without this: tips, search, sorting and zoom are added to it.

// Tips: what a mark says of itself, where the pointer or the focus is.
const tip = document.getElementById("tip");
const marks = "figure svg [aria-label], svg.lanes [aria-label]";
function showTip(mark, x, y) {
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const room = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(4, Math.min(x + 12, room - box.width - 4))}px`;
  tip.style.top = `${y + 16 + box.height < innerHeight ? y + 16 : Math.max(4, y - box.height - 12)}px`;
}
document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest?.(marks);
  if (mark && mark.getAttribute("role") !== "graphics-object" && mark.localName !== "svg") showTip(mark, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  const mark = event.target.closest(marks);
  const box = mark?.getBoundingClientRect();
  if (mark && mark.localName !== "svg") showTip(mark, box.left, Math.min(Math.max(box.top, 0), innerHeight - 40));
  else tip.hidden = true;
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

// Search: rows of which some text, folded or not, has every word.
function addSearch(field) {
  const rows = [...document.getElementById(field.dataset.filter).tBodies[0].rows];
  const count = document.querySelector(`output[for="${field.dataset.filter}"]`);
  const filter = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      left += !row.hidden;
    }
    count.textContent = words.length ? `${left} of ${rows.length}` : `${rows.length}`;
  };
  field.addEventListener("input", filter);
  filter();
}

// Sorting: a head is a button; numbers by value, the rest as text.
const valueOf = (row, column) => {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent.trim();
  return cell.dataset.value !== undefined || cell.classList.contains("number") ? (text === "" || isNaN(text) ? Infinity : Number(text)) : text;
};
function addSorting(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", way);
      const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
      const sign = way === "ascending" ? 1 : -1;
      rows.sort(([a], [b]) => sign * (typeof a === "number" ? (a === b ? 0 : a - b) : a.localeCompare(b, undefined, { numeric: true })));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

// The map: one tab stop, arrow keys from mark to mark; zoom changes its size, and the box around it scrolls.
function addWalkAndZoom(map) {
  const stops = [...map.querySelectorAll("[aria-label]")];
  for (const [at, stop] of stops.entries()) stop.setAttribute("tabindex", at ? -1 : 0);
  const walk = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };
  map.addEventListener("keydown", (event) => {
    const at = stops.indexOf(event.target.closest("[tabindex]"));
    const next = event.key === "Home" ? 0 : event.key === "End" ? stops.length - 1 : at + (walk[event.key] ?? NaN);
    if (at < 0 || !stops[next]) return;
    event.preventDefault();
    stops[at].setAttribute("tabindex", -1);
    stops[next].setAttribute("tabindex", 0);
    stops[next].focus();
  });
  const [, , width, height] = map.getAttribute("viewBox").split(" ").map(Number);
  const box = map.parentElement;
  let scale = 1;
  const zoom = (factor) => {
    const before = scale;
    scale = factor ? Math.min(4, Math.max(0.05, scale * factor)) : Math.min(1, box.clientWidth / width, box.clientHeight / height);
    const [x, y] = [box.scrollLeft + box.clientWidth / 2, box.scrollTop + box.clientHeight / 2];
    map.setAttribute("width", width * scale);
    map.setAttribute("height", height * scale);
    box.scrollTo((x * scale) / before - box.clientWidth / 2, (y * scale) / before - box.clientHeight / 2);
  };
  for (const button of box.previousElementSibling.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => zoom(Number(button.dataset.zoom)));
  box.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 200));
  }, { passive: false });
}

// What is packed is unpacked when it is opened, or when a link leads into it.
async function unpack(fold) {
  const packed = fold.querySelector("template");
  if (!packed) return;
  const bytes = Uint8Array.from(atob(packed.innerHTML.trim()), (c) => c.charCodeAt(0));
  packed.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const content = document.createElement("div");
  content.innerHTML = await new Response(stream).text();
  fold.append(content);
  enliven(content);
}

function enliven(root) {
  for (const tools of root.querySelectorAll(".tools")) tools.hidden = false;
  for (const field of root.querySelectorAll("input[data-filter]")) addSearch(field);
  for (const table of root.querySelectorAll("table.sortable")) addSorting(table);
  for (const map of root.querySelectorAll("svg.lanes")) addWalkAndZoom(map);
  for (const fold of root.querySelectorAll("details.packed")) fold.addEventListener("toggle", () => unpack(fold));
}
enliven(document);

document.addEventListener("click", async (event) => {
  const link = event.target.closest?.('a[href^="#g"]');
  const fold = document.querySelector("#groups ~ details.packed");
  if (!link || !fold) return;
  await unpack(fold);
  fold.open = true;
  document.getElementById(link.getAttribute("href").slice(1))?.scrollIntoView();
});

// On paper nothing is folded away but the lists within tables.
addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details:not(table details)")) fold.open = true; });
