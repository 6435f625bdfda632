// The line under the form: the link to share, and what is to be said about a link that was opened.
//
// A value is {query, copy}, {error} or {note}. A query is put into the address bar, so that the
// bar carries what is on the page; where it is to be copied it goes to the clipboard, and into a
// field to copy by hand where the browser does not allow that.

const box = element.querySelector(".mtad-share");
const text = make("p", "mtad-share-text");
text.setAttribute("role", "status");
const field = make("input", "mtad-share-link");
field.type = "text";
field.readOnly = true;
field.setAttribute("aria-label", "Link to this form");
field.addEventListener("focus", () => field.select());
const gone = make("button", "mtad-save", "Dismiss");
gone.type = "button";
gone.addEventListener("click", () => say("", false));
box.replaceChildren(text, field, gone);

function say(message, error, link) {
  setText(text, message);
  box.classList.toggle("mtad-share-error", error);
  box.classList.toggle("mtad-shown", Boolean(message));
  field.hidden = !link;
  field.value = link || "";
}

// Parts of an address that are not ours, such as gradio's theme, stay as they are.
function address(query) {
  const parts = new URLSearchParams();
  for (const [name, value] of new URLSearchParams(location.search)) {
    if (name.startsWith("__")) parts.append(name, value);
  }
  const rest = parts.toString();
  return location.pathname + "?" + query + (rest ? "&" + rest : "");
}

async function receive(value) {
  if (typeof value !== "string" || !value) return;
  const message = JSON.parse(value);
  if (message.error) return say(message.error, true);
  if (message.note) return say(message.note, false);
  if (typeof message.query !== "string") return;
  const path = address(message.query);
  history.replaceState(history.state, "", path);
  if (!message.copy) return;
  const link = location.origin + path;
  try {
    await navigator.clipboard.writeText(link);
    say("The link is copied. It fills in this form and runs nothing.", false, link);
  } catch {
    say("Copy this link. It fills in this form and runs nothing.", false, link);
    field.focus();
  }
}

say("", false);
watch("value", () => receive(props.value));
receive(props.value);
