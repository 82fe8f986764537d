const AT_ONCE = 100;
for (const field of document.querySelectorAll("input[type=search]")) {
  const box = field.closest(".search"), count = box.querySelector("output");
  const more = box.parentElement.querySelector(".more");
  const body = document.getElementById(field.dataset.rows), drawn = [...body.rows];
  const data = document.getElementById(`${field.dataset.rows}-rest`);
  let limit = drawn.length, rows;
  const all = () => rows ??= [...drawn, ...JSON.parse(data?.textContent ?? "[]")].map((row) => {
    const texts = Array.isArray(row) ? row : [row.textContent];
    return { texts, row: texts === row ? null : row, words: texts.join(" ").toLowerCase() };
  });
  const draw = (each) => {
    if (each.row) return each.row;
    each.row = drawn[0].cloneNode(true);
    each.row.querySelectorAll("[data-text]").forEach((place, i) => (place.textContent = each.texts[i]));
    return each.row;
  };
  const show = () => {
    const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = all().filter((each) => wanted.every((word) => each.words.includes(word)));
    body.replaceChildren(...found.slice(0, limit).map(draw));
    count.textContent = wanted.length ? `${found.length} of ${rows.length}` : "";
    if (more) more.hidden = found.length <= limit;
  };
  box.hidden = false;
  field.addEventListener("input", () => { limit = drawn.length; show(); });
  if (!more) continue;
  more.hidden = false;
  more.firstElementChild.addEventListener("click", () => { limit += AT_ONCE; show(); });
}
