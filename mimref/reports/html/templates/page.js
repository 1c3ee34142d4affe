"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const address = (number) => page.prefix + page.images[number];
for (const image of document.querySelectorAll("img[data-image]")) {
  image.src = address(image.dataset.image);
  image.title = image.alt;
}
const images = page.images.map((_, number) => ({ number, source: address(number) }));
const options = { actions: false, renderer: "svg", defaultStyle: false, tooltip: { disableDefaultStyle: true } };
const drawn = Object.entries(page.charts).map(([name, chart]) => {
  if (name.startsWith("map")) chart.datasets = { ...chart.datasets, images };
  return vegaEmbed(document.getElementById(name), chart, options);
});
Promise.all(drawn).then(() => (document.documentElement.dataset.drawn = "yes"));
