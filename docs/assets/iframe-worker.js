// Search runs in a web worker, which browsers refuse to a page that is opened as a file. There this class takes the place
// of Worker and runs the worker's script in a hidden frame. Over http the browser's own Worker is used.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.documentElement.append(this.frame)
      const inside = this.frame.contentWindow
      inside.postMessage = data => setTimeout(() => this.onmessage?.(new MessageEvent("message", {data})))
      const script = inside.document.createElement("script")
      script.src = new URL(url, location.href)
      this.ready = new Promise((resolve, reject) => {
        script.onload = resolve
        script.onerror = event => reject(event) || this.onerror?.(event)
      })
      inside.document.head.append(script)
    }
    postMessage(data) {
      const deliver = () => this.frame.contentWindow?.dispatchEvent(new MessageEvent("message", {data}))
      this.ready.then(() => setTimeout(deliver))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
