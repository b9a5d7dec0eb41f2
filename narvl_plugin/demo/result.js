// A touched token puts its heat map in the place of the image, until it, or another one, is touched.
element.setAttribute("aria-live", "polite");
element.addEventListener("click", (event) => {
  const token = event.target.closest("button[data-token]");
  if (token === null) return;
  const answer = token.closest(".answer");
  const figure = answer.querySelector("figure");
  const image = figure.querySelector("svg image");
  const pressed = token.getAttribute("aria-pressed") !== "true";
  figure.dataset.plain ??= image.getAttribute("href");
  for (const other of answer.querySelectorAll("button[data-token]")) {
    other.setAttribute("aria-pressed", pressed && other.dataset.token === token.dataset.token);
  }
  const [text, heat] = pressed ? JSON.parse(figure.dataset.heats)[token.dataset.token] : ["", figure.dataset.plain];
  image.setAttribute("href", heat);
  figure.querySelector("figcaption").textContent = pressed ? `Bright where the model looked for “${text}”` : "";
});
// On a phone the answer is below what was asked.
watch("value", () => {
  if (matchMedia("(max-width: 700px)").matches) element.scrollIntoView({block: "start", behavior: "smooth"});
});
