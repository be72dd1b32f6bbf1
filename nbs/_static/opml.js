/* The figures and widgets of a page, drawn without a kernel and from files of this site alone.
   Plotly figures: <div class="opml-fig"> with their JSON and a picture inside; the picture becomes the figure when a reader
   touches it or its controls, so that a page which is only read loads no plotly. Widgets: the state that the run saved, shown by the
   classic-notebook build that every ipywidgets brings along (widgets/extension.js); here is the little of a classic
   notebook that it asks for. */
(() => {
"use strict"
const here = (document.currentScript.src || "./").replace(/[^/]*$/, "")
const VIEW = "application/vnd.jupyter.widget-view+json", STATE = "application/vnd.jupyter.widget-state+json"
const PLOTLY = "application/vnd.plotly.v1+json"
const saved = mime => [...document.querySelectorAll(`script[type="${mime}"]`)]

/* text of a figure in the colour that the page, light or dark, has for what stands back; followed when the theme changes */
const soft = () => getComputedStyle(document.documentElement).getPropertyValue("--pst-color-text-muted").trim()
const unpacked = base64 => new Response(new Blob([Uint8Array.from(atob(base64), c => c.charCodeAt(0))]).stream()
  .pipeThrough(new DecompressionStream("gzip")))
/* plotly: inside a page that is one file, else a file of this site */
let library
function plotly() {
  return library ??= (async () => {
    const packed = document.getElementById("opml-plotly"), script = document.createElement("script")
    if (window.Plotly) return
    if (packed) {
      script.textContent = await unpacked(packed.textContent).text()
      return document.head.append(script)
    }
    const loaded = new Promise((ok, fail) => { script.onload = ok; script.onerror = () => fail(new Error("plotly.min.js is missing")) })
    script.src = `${here}plotly.min.js`
    document.head.append(script)
    await loaded
  })()
}
/* a colour of the house style, moved towards the page's text, so that words in it can be read, too */
function readable(colour) {
  const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true})
  const rgb = c => { pen.fillStyle = c; pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data] }
  const text = rgb(getComputedStyle(document.body).color)
  return `rgb(${rgb(colour).slice(0, 3).map((v, i) => Math.round(.7 * v + .3 * text[i])).join()})`
}
const inked = layout => ({font: {...layout?.font, color: soft()}, ...layout?.annotations && {annotations: layout.annotations.map(note =>
  note.font?.color ? {...note, font: {...note.font, color: readable(note.font.color)}} : note)}})
/* on a narrow screen titles take more lines, and the legend has a line for each series */
function fitted(box, {data, layout}) {
  const wide = box.clientWidth
  if (!wide || wide >= 600) return layout
  const broken = (text, px) => { const lines = [""]
    for (const word of (text ?? "").replace(/<br>/g, " ").split(" ")) {
      if (lines.at(-1) && (lines.at(-1).length + word.length) * 8.2 > px) lines.push("")
      lines.push(`${lines.pop()} ${word}`.trim()) }
    return lines }
  const fit = {...layout}, head = broken(layout?.title?.text, wide - 60)
  if (layout?.title?.text) fit.title = {...layout.title, text: head.join("<br>"), pad: {t: head.length > 1 ? 22 : 8}}
  for (const name of Object.keys(layout ?? {}).filter(k => /^[xy]axis\d*$/.test(k) && layout[k].title?.text)) {
    const [low, high] = layout[name].domain ?? [0, 1], room = name[0] === "x" ? wide - 80 : box.clientHeight - 110
    fit[name] = {...layout[name], title: {...layout[name].title, text: broken(layout[name].title.text, room * (high - low)).join("<br>")}}
  }
  const series = layout?.showlegend === false ? 0 : new Set(data.filter(t => t.name && t.showlegend !== false).map(t => t.name)).size
  const more = 19 * (head.length - 1 + Math.max(0, series - 1)), t = layout?.margin?.t ?? layout?.template?.layout?.margin?.t ?? 100
  return {...fit, margin: {...layout?.margin, t: t + more}, height: box.clientHeight + more}
}
function draw(box, figure) {
  const layout = structuredClone({...fitted(box, figure), ...inked(figure.layout)})   // plotly writes its ranges into it
  if (box.clientWidth < 600) box.style.height = `${layout.height ?? box.clientHeight}px`
  box.opmlLayout = figure.layout
  return Plotly.newPlot(box, figure.data, layout, {responsive: true, displaylogo: false, ...figure.config})
}
const recoloured = () => document.querySelectorAll(".js-plotly-plot").forEach(box => Plotly.relayout(box, inked(box.opmlLayout)))
new MutationObserver(recoloured).observe(document.documentElement, {attributeFilter: ["data-theme"]})
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recoloured)

/* the states of a figure's controls, rendered when the page was made: {controls, together, frames} */
function changed(figure, changes) {
  const fig = structuredClone({data: figure.data, layout: figure.layout})
  for (const [path, value] of changes) {
    let at = fig
    for (const key of path.slice(0, -1)) at = at[key] ??= {}
    if (value === null) delete at[path.at(-1)]; else at[path.at(-1)] = value
  }
  return fig
}
function element(name, settings, ...inside) {
  const made = Object.assign(document.createElement(name), settings)
  made.append(...inside)
  return made
}
/* a control over the choices [[index, text], ...]: {shown: its element, at(): its place, set(place)} */
function control({name, choices}) {
  const texts = choices.map(c => c[1]), number = texts.length > 2 && texts.every(t => t !== "" && isFinite(t))
  if (number) {
    const input = element("input", {type: "range", min: 0, max: texts.length - 1, step: 1, name})
    const told = element("output", {})
    const tell = () => { told.textContent = texts[input.value]; input.setAttribute("aria-valuetext", texts[input.value]) }
    input.addEventListener("input", tell)
    return {shown: element("label", {}, `${name} `, input, told), at: () => +input.value, set: i => { input.value = i; tell() }}
  }
  if (texts.join() === "no,yes") {
    const input = element("input", {type: "checkbox", name})
    return {shown: element("label", {}, input, ` ${name}`), at: () => +input.checked, set: i => { input.checked = !!i }}
  }
  const input = element("select", {name}, ...texts.map((t, i) => new Option(t, i)))
  return {shown: element("label", {}, `${name} `, input), at: () => +input.value, set: i => { input.value = i }}
}
async function playable(form, figure, drawn) {
  const {controls, together, frames} = await unpacked(form.dataset.states).json()
  const note = element("output", {className: "opml-note"}), keys = Object.keys(frames).map(k => k.split(",").map(Number))
  const parts = controls.map(control), homes = controls.map(c => c.choices.findIndex(([i]) => i === c.at))
  parts.forEach((p, i) => p.set(homes[i]))
  const asked = () => {
    const now = parts.map((p, i) => controls[i].choices[p.at()][0])
    const far = key => key.reduce((sum, v, i) => sum + Math.abs(v - now[i]), 0)
    return frames[keys.reduce((a, b) => far(b) < far(a) ? b : a).join()]
  }
  const show = async () => {
    note.textContent = asked()[0]
    const box = await drawn()
    const fig = changed(figure, asked()[1]), tall = fig.layout.height ?? +box.dataset.height
    box.opmlLayout = fig.layout
    const layout = {...fig.layout, template: figure.layout.template}
    const fit = fitted({clientWidth: box.clientWidth, clientHeight: tall}, {data: fig.data, layout})
    box.style.height = `${fit.height ?? tall}px`                  // a state may be taller than the first
    return Plotly.react(box, fig.data, {...fit, ...inked(layout)})
  }
  parts.forEach((p, i) => p.shown.addEventListener("input", () => {
    if (!together) parts.forEach((q, j) => j !== i && q.set(homes[j]))
    show()
  }))
  form.addEventListener("submit", event => event.preventDefault())
  form.append(...parts.filter((_, i) => controls[i].choices.length > 1).map(p => p.shown), note)  // no choice: not shown
  if (!together) form.append(element("small", {}, "Here each control moves alone; in a notebook, together."))
  note.textContent = asked()[0]
}

/* a figure: its picture first; drawn() puts the interactive one in its place, once */
const figures = []
async function prepared(box) {
  const figure = JSON.parse(box.querySelector("script").textContent), picture = box.querySelector("img")
  const form = box.previousElementSibling?.matches(".opml-play") ? box.previousElementSibling : null
  let begun
  const drawn = () => begun ??= (async () => {
    await plotly()
    const before = [...box.childNodes]
    box.setAttribute("role", "figure")
    box.setAttribute("aria-label", picture?.alt ?? "a figure")
    box.style.height = `${box.dataset.height}px`
    box.replaceChildren()
    try { await draw(box, figure) } catch (error) { box.replaceChildren(...before); throw error }
    return box
  })()
  const touched = () => drawn().catch(console.error)
  figures.push(touched)
  for (const part of [box, form]) for (const way of ["pointerenter", "touchstart", "focusin"])
    part?.addEventListener(way, touched, {once: true, passive: true})
  if (!picture) new IntersectionObserver(([seen], observer) => { if (seen.isIntersecting) { observer.disconnect(); touched() } }).observe(box)
  if (form) await playable(form, figure, drawn)
}
async function drawAll() {
  await Promise.all(figures.map(touched => touched()))
  document.documentElement.dataset.opml = "drawn"
}
window.opml = {drawAll}

/* modules in AMD form: `define(needs, make)` in a file of widgets/ */
let defined
const loading = {}
window.define = (needs, make) => { defined = [needs, make] }
function load(file) {
  return loading[file] ??= new Promise((ok, fail) => {
    const script = Object.assign(document.createElement("script"), {src: `${here}widgets/${file}.js`})
    script.onload = async () => {
      const [needs, make] = defined
      try { ok(await make(...await Promise.all(needs.map(module)))) } catch (error) { fail(error) }
    }
    script.onerror = () => fail(new Error(`${file}.js is missing`))
    document.head.append(script)
  })
}
async function module(name) {
  if (name === "module") return {uri: `${here}widgets/extension.js`}
  if (name === "base/js/namespace") return Jupyter
  if (name === "base/js/events") return Jupyter.notebook.events
  if (name === "notebook/js/outputarea") return {OutputArea}
  if (name.startsWith("@jupyter-widgets/")) return load("extension")
  if (name === "anywidget") return load("anywidget")
  throw new Error(`widgets of ${name} need JupyterLab`)
}
window.requirejs = window.require = (names, ok, fail) =>
  void Promise.all(names.map(module)).then(found => ok(...found), fail)
window.requirejs.config = () => {}

/* what an Output widget held when the run ended */
class OutputArea {
  constructor({selector}) { this.element = selector; this.outputs = [] }
  register_mime_type() {}
  clear_output() { this.element.replaceChildren() }
  handle_clear_output() { this.clear_output() }
  handle_output() {}
  toJSON() { return this.outputs }
  fromJSON(outputs) {
    this.outputs = outputs
    for (const {text, data = {}, traceback} of outputs) {
      const box = document.createElement("div")
      const html = data["text/html"], png = data["image/png"], plain = text ?? data["text/plain"] ?? traceback
      this.element.append(box)
      if (data[PLOTLY]) plotly().then(() => draw(box, data[PLOTLY]))
      else if (html) box.innerHTML = [html].flat().join("")
      else if (png) box.append(Object.assign(new Image(), {src: `data:image/png;base64,${png}`}))
      else box.append(Object.assign(document.createElement("pre"), {textContent: [plain ?? ""].flat().join("")}))
    }
  }
}

/* ipywidgets give the handle of a slider, and a field without a label, no name */
function named(box) {
  for (const handle of box.querySelectorAll(".noUi-handle, :is(input, select, textarea):not([aria-label], [id])"))
    handle.setAttribute("aria-label", handle.closest(".jupyter-widgets")?.querySelector(".widget-label")?.textContent.trim() || "value")
}
async function widgets(state, views) {
  const kernel = {is_connected: () => true, comm_info: (_, answer) => answer({content: {comms: {}}})}
  kernel.comm_manager = {kernel, register_target() {}}
  const deaf = {on() {}, register_events() {}, register() {}, get: () => ({handler() {}})}
  deaf.actions = deaf
  window.Jupyter = {
    version: "6.5.0", notification_area: {widget: () => ({})}, menubar: deaf,
    notebook: {kernel, events: deaf, container: deaf, keyboard_manager: deaf, metadata: {}, get_cells: () => []}}
  document.body.insertAdjacentHTML("beforeend", '<ul hidden><li><a id="help_menu"></a></li></ul>')
  const classic = await load("extension")
  await classic.load_ipython_extension()
  if (window.MathJax && !MathJax.Hub) MathJax.Hub = {Queue: call => MathJax.typesetPromise?.([call[2]])}
  const manager = kernel.widget_manager
  await manager.set_state(state)
  for (const script of views) {
    const box = Object.assign(document.createElement("div"), {className: "opml-widget"})
    script.after(box)
    try {
      const model = await manager.get_model(JSON.parse(script.textContent).model_id)
      classic.JupyterLuminoWidget.attach((await manager.create_view(model)).luminoWidget, box)
      new MutationObserver(() => named(box)).observe(box, {childList: true, subtree: true})   // parts come later
      named(box)
    } catch (error) { box.textContent = `This widget cannot be shown here: ${error.message}` }
  }
}

document.addEventListener("DOMContentLoaded", async () => {
  for (const box of document.querySelectorAll(".opml-fig"))
    await prepared(box).catch(console.error)       // one figure that can't be drawn takes no other with it
  const [state] = saved(STATE), views = saved(VIEW)
  if (state && views.length) await widgets(JSON.parse(state.textContent), views)
  document.documentElement.dataset.opml = "ready"
})
})()
