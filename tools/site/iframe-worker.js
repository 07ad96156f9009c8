// Browsers start no workers on pages that are opened as files. There, a hidden frame runs the worker of the search.
// Material for MkDocs would load a script for this from another host if no file with this name were given.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const script = frame.contentDocument.createElement("script");
      const loaded = new Promise((resolve) => (script.onload = resolve));
      frame.contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.postMessage = (data) =>
        loaded.then(() => frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
      script.src = url;
      frame.contentDocument.head.append(script);
    }
  };
}
