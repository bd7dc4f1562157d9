"use strict";
// What a mark says, on hover and by keyboard.
const told = document.getElementById("told");
let current = null;

function tell(mark) {
  if (current) current.classList.remove("at");
  current = mark;
  told.hidden = !mark;
  if (!mark) return;
  mark.classList.add("at");
  told.textContent = mark.dataset.told;
  const place = mark.getBoundingClientRect(), box = told.getBoundingClientRect();
  const left = Math.min(place.right + 8, innerWidth - box.width - 8);
  const above = place.top - box.height - 8;
  told.style.left = Math.max(8, left) + "px";
  told.style.top = (above < 8 ? place.bottom + 8 : above) + "px";
}

document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest("[data-told]");
  if (mark || !document.activeElement.matches(":is(.plot, .shaded):focus-visible")) tell(mark);
});
document.addEventListener("scroll", () => current && tell(current), true);

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function spot(mark) {
  if (mark.tagName === "SPAN") {
    const box = mark.getBoundingClientRect();
    return [box.left, box.top];
  }
  const get = (name) => Number(mark.getAttribute(name));
  return mark.tagName === "rect" ? [get("x"), get("y")] : [get("cx"), get("cy")];
}

// The nearest mark in the arrow's direction; what lies aside counts three times.
function next(marks, from, [dx, dy]) {
  const [x, y] = spot(from);
  let best = null, least = Infinity;
  for (const mark of marks) {
    const [a, b] = spot(mark);
    const ahead = (a - x) * dx + (b - y) * dy;
    const cost = ahead + 3 * Math.abs((a - x) * dy + (b - y) * dx);
    if (ahead > 0 && cost < least) [best, least] = [mark, cost];
  }
  return best || from;
}

for (const plot of document.querySelectorAll(".plot, .shaded")) {
  const marks = [...plot.querySelectorAll("[data-told]")];
  if (!marks.length) continue;
  let mine = marks[0];
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && tell(mine));
  plot.addEventListener("blur", () => tell(null));
  plot.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return tell(null);
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    mine = next(marks, mine, ARROWS[event.key]);
    mine.scrollIntoView({ block: "nearest", inline: "nearest" });
    tell(mine);
  });
}
document.addEventListener("keydown", (event) => event.key === "Escape" && tell(null));

// Tables sort by a heading: numbers from the largest, texts from A; once more turns them round.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), table = heading.closest("table");
    const column = heading.cellIndex, body = table.tBodies[0];
    const numeric = heading.classList.contains("number");
    const before = heading.getAttribute("aria-sort");
    const up = before === "none" ? !numeric : before === "descending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      if (!numeric) return a.cells[column].textContent.localeCompare(b.cells[column].textContent);
      return Number(value(a)) - Number(value(b));
    };
    const known = [...body.rows].filter((row) => !numeric || value(row) !== undefined);
    const unknown = [...body.rows].filter((row) => numeric && value(row) === undefined);
    known.sort((a, b) => (up ? compare(a, b) : compare(b, a)));
    body.append(...known, ...unknown);
  });
}
