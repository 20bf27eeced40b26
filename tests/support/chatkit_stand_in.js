// Stands in for the script on OpenAI's CDN, which tests cannot load: the same custom element, with
// a plain chat in it. It keeps the options that the page sets, and speaks ChatKit's protocol.
customElements.define(
  "openai-chatkit",
  class extends HTMLElement {
    setOptions(options) {
      this.options = options;
      this.threadId = null;
      this.attachShadow({ mode: "open" }).innerHTML = `
        <style>
          main { max-width: 36rem; margin: auto; padding: 1rem 2rem }
          p { color: #666; text-align: center }
          .user { margin-left: auto; width: fit-content; background: #eee }
          .user, .assistant { border-radius: 1rem; padding: 0.5rem 1rem; margin-bottom: 1rem }
          input { box-sizing: border-box; width: 100%; padding: 0.75rem; font: inherit }
        </style>
        <main><p>A stand-in for OpenAI's component</p><div id="items"></div><form><input placeholder="Message the AI"></form></main>`;
      const form = this.shadowRoot.querySelector("form");
      form.onsubmit = (event) => {
        event.preventDefault();
        this.send(form.elements[0].value);
        form.reset();
      };
    }

    show(kind, text) {
      const item = document.createElement("div");
      item.className = kind;
      item.textContent = text;
      this.shadowRoot.getElementById("items").append(item);
      return item;
    }

    async send(text) {
      const content = [{ type: "input_text", text }];
      const params = { input: { content, attachments: [], inference_options: {} } };
      if (this.threadId) params.thread_id = this.threadId;
      const type = this.threadId ? "threads.add_user_message" : "threads.create";
      const response = await this.options.api.fetch(this.options.api.url, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ type, params }),
      });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n\n");
        rest = lines.pop();
        lines.forEach((line) => this.receive(JSON.parse(line.slice("data: ".length))));
      }
    }

    receive(event) {
      if (event.type === "thread.created") this.threadId = event.thread.id;
      if (event.type === "thread.item.done" && event.item.type === "user_message")
        this.show("user", event.item.content[0].text);
      if (event.type === "thread.item.added") this.reply = this.show("assistant", "");
      if (event.update?.type === "assistant_message.content_part.text_delta")
        this.reply.textContent += event.update.delta;
      if (event.type === "error") this.show("error", event.message);
    }
  },
);
