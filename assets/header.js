// The header: the pair, its device, and how far the loading is. Texts by textContent only.

const pair = element.querySelector(".mtad-pair");
const device = element.querySelector(".mtad-device");
const notes = element.querySelector(".mtad-pair-notes");
const bar = element.querySelector("progress");

function show(text) {
  if (typeof text !== "string" || !text) return;
  const view = JSON.parse(text);
  const ready = view.state === "ready";
  element.firstElementChild.dataset.state = view.state;
  pair.textContent = ready ? view.models || view.pair : "Pair " + view.pair;
  device.textContent = ready ? view.device : view.text;
  notes.replaceChildren(
    ...view.notes.map((note) => {
      const item = document.createElement("li");
      item.textContent = note;
      return item;
    })
  );
  bar.hidden = view.state !== "loading";
  if (view.fraction === null) bar.removeAttribute("value");
  else bar.value = view.fraction;
}

watch("value", () => show(props.value));
show(props.value);
