document.documentElement.classList.add("js");
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const shown = value => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
const charts = all(".chart").map(box => ({box, svg: box.querySelector("svg"), cursor: box.querySelector(".cursor"),
  keys: all(".key b", box), last: all(".key b", box).map(b => b.textContent), caption: box.querySelector("small"),
  note: box.querySelector("small").textContent, ...JSON.parse(box.querySelector("script").textContent)}));
function nearest(rows, step) {
  let low = 0, high = rows.length - 1;
  while (low < high) { const middle = (low + high) >> 1; rows[middle][0] < step ? low = middle + 1 : high = middle; }
  return low && step - rows[low - 1][0] < rows[low][0] - step ? rows[low - 1] : rows[low];
}
function read(step) {
  for (const {svg, cursor, keys, last, caption, note, range, lines} of charts) {
    const inside = step !== null && step >= range[0] && step <= range[1];
    cursor.style.visibility = inside ? "visible" : "hidden";
    caption.textContent = inside ? `step ${Math.round(step)}` : note;
    if (inside) {
      const x = frame.left + (step - range[0]) / (range[1] - range[0]) * (frame.width - frame.left - frame.right);
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    }
    keys.forEach((key, place) => {
      const row = inside ? nearest(lines[place], step) : null;
      const interval = row && row.length > 2 ? ` (${shown(row[2])} to ${shown(row[3])})` : "";
      key.textContent = row ? shown(row[1]) + interval : last[place];
    });
  }
}
for (const {svg, range} of charts) {
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * frame.width;
    const share = (x - frame.left) / (frame.width - frame.left - frame.right);
    read(range[0] + Math.min(1, Math.max(0, share)) * (range[1] - range[0]));
  });
  svg.addEventListener("pointerleave", () => read(null));
}
for (const group of all(".group")) {
  const light = target => {
    const found = target && target.closest("[data-k]"), number = found && found.dataset.k;
    group.classList.toggle("hot", Boolean(found));
    for (const part of all("[data-k]", group)) part.classList.toggle("lit", part.dataset.k === number);
  };
  group.addEventListener("pointerover", event => light(event.target));
  group.addEventListener("pointerleave", () => light(null));
  group.addEventListener("focusin", event => light(event.target));
  group.addEventListener("focusout", () => light(null));
}
function filters(form, keep, orders) {
  const parent = form.nextElementSibling, items = [...parent.children];
  const apply = () => {
    const wanted = Object.fromEntries(new FormData(form));
    let count = 0;
    for (const item of items) { item.hidden = !keep(item.dataset, wanted); count += !item.hidden; }
    if (orders) {
      parent.append(...[...items].sort((a, b) => orders[wanted.order](a.dataset, b.dataset)));
    }
    form.querySelector("output").textContent = `${count} of ${items.length} shown`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", event => event.preventDefault());
  apply();
}
const within = (value, low, high) => (low === "" || value >= +low) && (high === "" || value <= +high);
for (const form of all(".group-filters")) filters(form,
  (d, w) => within(+d.step, w.step_from, w.step_to) &&
    within(+d.reward, w.reward_from, w.reward_to) && (!w.file || d.file === w.file),
  {spread: (a, b) => b.spread - a.spread, best: (a, b) => b.reward - a.reward, worst: (a, b) => a.reward - b.reward,
   newest: (a, b) => b.step - a.step, oldest: (a, b) => a.step - b.step});
for (const form of all(".answer-filters")) filters(form,
  (d, w) => (!w.set || d.set === w.set) && (!w.kind || d.kinds.split("|").includes(w.kind)));
