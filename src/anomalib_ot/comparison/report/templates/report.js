"use strict";
{
  const form = document.getElementById("controls");
  const list = document.getElementById("pictures");
  const chosen = (name) => document.getElementById(name).value;
  const orders = {
    failures: (a, b) => a.dataset.failures - b.dataset.failures,
    disagreement: (a, b) => b.dataset.disagreement - a.dataset.disagreement,
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, { numeric: true }),
  };
  const update = () => {
    const items = [...list.children].sort(orders.failures).sort(orders[chosen("sort")]);
    const fits = (item, name) => !chosen(name) || item.dataset[name] === chosen(name);
    for (const item of items) {
      item.hidden = !fits(item, "category") || !fits(item, "kind");
    }
    list.append(...items);
    const shown = items.filter((item) => !item.hidden).length;
    document.getElementById("count").textContent = `${shown} of ${items.length} images`;
  };
  if (form) {
    form.addEventListener("change", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    // The event fires before the values are reset.
    form.addEventListener("reset", () => setTimeout(update));
    form.hidden = false;
    update();
  }
}
