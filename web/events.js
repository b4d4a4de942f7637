// Server-sent events in the body of a response. EventSource cannot be used, because it only sends GET.

/**
 * Reads events until the body ends.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @yields {{name: string, data: object}} the name of an event, and its data, which is JSON
 */
export async function* readEvents(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let event = { name: "", data: "" };
    for (;;) {
        const { value, done } = await reader.read();
        if (done) {
            return;
        }
        // Only the new text is searched for lines: one line can have many megabytes.
        const lines = value.split("\n");
        lines[0] = rest + lines[0];
        rest = lines.pop();
        for (const line of lines) {
            if (line === "" && event.data !== "") {
                yield { name: event.name, data: JSON.parse(event.data) };
                event = { name: "", data: "" };
            } else if (line.startsWith("event:")) {
                event.name = line.slice("event:".length).trim();
            } else if (line.startsWith("data:")) {
                event.data += line.slice("data:".length);
            }
        }
    }
}
