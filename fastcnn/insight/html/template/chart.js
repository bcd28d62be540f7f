// The values of every line where one points, by mouse, finger or arrow keys.
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const pointer = plot.querySelector(".pointer");
  const rule = pointer.querySelector(".rule");
  const marks = pointer.querySelectorAll(".mark");
  const values = figure.querySelectorAll(".value");
  const at = figure.querySelector(".at");
  const before = [at.textContent, ...Array.from(values, (value) => value.textContent)];
  const last = data.x.length - 1;
  let shown = last;
  if (last < 0) continue;

  const write = (where, texts) => {
    at.textContent = where;
    texts.forEach((text, i) => { values[i].textContent = text; });
  };
  const show = (index) => {
    shown = index;
    const x = data.at[index];
    rule.setAttribute("transform", `translate(${x} 0)`);
    data.series.forEach((line, i) => {
      const y = line.at[index];
      marks[i].setAttribute("visibility", y === null ? "hidden" : "inherit");
      marks[i].setAttribute("cx", x);
      marks[i].setAttribute("cy", y ?? 0);
    });
    pointer.setAttribute("visibility", "visible");
    write(`${data.name} ${data.x[index]}`, data.series.map((line) => line.text[index]));
  };
  const leave = () => {
    pointer.setAttribute("visibility", "hidden");
    shown = last;
    write(before[0], before.slice(1));
  };
  const nearest = (event) => {
    const box = plot.getBoundingClientRect();
    const x = (event.clientX - box.left) * data.width / box.width;
    let best = 0;
    data.at.forEach((place, i) => {
      if (Math.abs(place - x) < Math.abs(data.at[best] - x)) best = i;
    });
    return best;
  };
  plot.addEventListener("pointerdown", (event) => show(nearest(event)));
  plot.addEventListener("pointermove", (event) => show(nearest(event)));
  // a finger that is lifted leaves the values to be read
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const wide = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: shown - wide, ArrowRight: shown + wide, Home: 0, End: last };
    if (event.key === "Escape") leave();
    if (!(event.key in to)) return;
    event.preventDefault();
    show(Math.max(0, Math.min(last, to[event.key])));
  });
}
