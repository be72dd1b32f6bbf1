(function () {
  function soft() { return getComputedStyle(document.documentElement).getPropertyValue('--soft').trim() }
  function draw(e) {
    if (e.dataset.drawn) return
    e.dataset.drawn = 1
    var f = JSON.parse(document.getElementById(e.dataset.of).textContent), clear = 'rgba(0,0,0,0)'
    f.layout = Object.assign(f.layout || {}, {paper_bgcolor: clear, plot_bgcolor: clear, autosize: true})
    delete f.layout.width
    f.layout.font = Object.assign({}, f.layout.font, {color: soft()})
    Plotly.newPlot(e, f.data, f.layout, {displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: ''})
  }
  var all = document.querySelectorAll('.fig')
  var seen = new IntersectionObserver(function (list) {
    list.forEach(function (x) { if (x.isIntersecting) { seen.unobserve(x.target); draw(x.target) } })
  }, {rootMargin: '400px'})
  all.forEach(function (e) { seen.observe(e) })
  addEventListener('beforeprint', function () { all.forEach(draw) })
  document.getElementById('theme').addEventListener('click', function () {
    all.forEach(function (e) { if (e.dataset.drawn) Plotly.relayout(e, {'font.color': soft()}) })
  })
})()
