(() => {
  const found = [], width = document.documentElement.clientWidth;
  const name = (e) => `${e.tagName.toLowerCase()}.${e.getAttribute("class") || ""} “${e.textContent.trim().slice(0, 40)}”`;
  const visible = (e) => e.checkVisibility();
  if (document.documentElement.scrollWidth > width) found.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const e of document.querySelectorAll("body *")) {
    if (!visible(e)) continue;
    const style = getComputedStyle(e);
    if (style.overflowX !== "visible" && e.scrollWidth > e.clientWidth + 1 && e.tagName !== "svg") {
      const cue = e.nextElementSibling;
      if (!(e.hasAttribute("data-scrolls") && cue?.className === "cue" && visible(cue))) found.push(`scrolls without a cue: ${name(e)}`);
    }
  }
  for (const box of document.querySelectorAll(".cards, .figures")) {
    if (!visible(box)) continue;
    const rows = new Map(), edge = box.getBoundingClientRect().right;
    for (const item of box.children) {
      const r = item.getBoundingClientRect();
      rows.set(Math.round(r.top), Math.max(rows.get(Math.round(r.top)) || 0, r.right));
    }
    for (const [top, right] of rows) if (right < edge - 2) found.push(`a row of ${box.className} ends ${Math.round(edge - right)} px early`);
  }
  for (const table of document.querySelectorAll("table")) {
    const columns = table.rows[0].cells.length;
    for (const row of table.rows) {
      if (row.cells.length !== columns) found.push(`a row of ${row.cells.length} cells of ${columns}: ${name(row)}`);
      for (const cell of row.cells) if (!cell.textContent.trim()) found.push(`an empty cell: ${name(row)}`);
    }
  }
  const parse = (text) => text.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((p) => p / 255).map((p) => (p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4)).reduce((sum, p, i) => sum + p * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor, p = parse(c);
      if (p.length < 4 || p[3] > 0) return p;
    }
    return [255, 255, 255];
  };
  const low = new Map();
  for (const e of document.querySelectorAll("body *")) {
    if (!visible(e) || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    if (["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    const style = getComputedStyle(e), svg = e.closest("svg");
    const ink = parse(svg ? style.fill : style.color);
    if (svg && ink.join() === [0, 0, 0].join() || (svg && ink.join() === [255, 255, 255].join())) continue;
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) low.set(`contrast ${ratio.toFixed(2)}: ${style.fill} ${style.color} ${name(e)}`, 1);
  }
  return [...found, ...low.keys()];
})()
