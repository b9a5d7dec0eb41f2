element.addEventListener("click", (event) => {
  const example = event.target.closest("button[data-number]");
  if (example !== null) trigger("click", {number: Number(example.dataset.number)});
});
