// Of a heat map or a reply: says what is pointed at, walks with the arrow keys, reports clicks.
const ITEM = "[data-told], [data-expert]";
const items = () => [...element.querySelectorAll(ITEM)];
const item_of = (event) => event.target.closest(ITEM);
let at = null;

// Clicks are reported one report at a time, those since the last one together: of several answers on their way gradio
// may leave one out.
let clicked = [];
let patience = null;
const report = () => {
  if (patience || !clicked.length) return;
  trigger("click", { experts: clicked });
  clicked = [];
  patience = setTimeout(answered, 3000);
};
const answered = () => { clearTimeout(patience); patience = null; report(); };

const tell = (item) => {
  const told = element.querySelector(".told");
  if (item && told) { at = item; told.textContent = item.dataset.told ?? item.getAttribute("aria-label"); }
};

const reachable = () => { // one of all of them is reached by Tab: where one was, or the first
  const all = items();
  if (!all.includes(at)) at = null;
  all.forEach((item) => { item.tabIndex = -1; });
  if (all.length) (at ?? all[0]).tabIndex = 0;
};

const step = (item, key) => {
  const row = item.closest("tr");
  if (!row) return { ArrowRight: [1], ArrowDown: [1], ArrowLeft: [-1], ArrowUp: [-1] }[key]
    ?.map((by) => items()[items().indexOf(item) + by])[0];
  const cell = item.parentElement;
  const next = {
    ArrowRight: cell.nextElementSibling,
    ArrowLeft: cell.previousElementSibling,
    ArrowDown: row.nextElementSibling?.children[cell.cellIndex],
    ArrowUp: row.previousElementSibling?.children[cell.cellIndex],
  }[key];
  return next?.querySelector(ITEM);
};

element.addEventListener("mouseover", (event) => tell(item_of(event)));
element.addEventListener("focusin", (event) => { tell(item_of(event)); reachable(); });
element.addEventListener("click", (event) => {
  const item = item_of(event);
  if (!item) return;
  tell(item);
  reachable();
  if (item.dataset.expert) { clicked.push([+item.dataset.layer, +item.dataset.expert]); report(); }
});
element.addEventListener("keydown", (event) => {
  const item = item_of(event);
  const next = item && step(item, event.key);
  if (!next) return;
  event.preventDefault();
  at = next;
  reachable();
  next.focus();
});
watch("value", () => { answered(); reachable(); if (at) tell(at); });
reachable();
