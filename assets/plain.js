// Shows the component's value as text, in the one element of its template.

const line = element.firstElementChild;
watch("value", () => setText(line, String(props.value || "")));
setText(line, String(props.value || ""));
