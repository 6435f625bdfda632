// A line of text that the server sets.

const line = element.querySelector("p");

function show() {
  if (typeof props.value === "string" && props.value) setText(line, JSON.parse(props.value).line);
}

watch("value", show);
show();
