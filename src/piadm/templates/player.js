(() => {
  const slider = document.getElementById("frame"), button = document.getElementById("play");
  const cells = document.querySelectorAll("#player .cell"), captions = JSON.parse(slider.dataset.captions);
  let timer = null;
  const show = () => {
    cells.forEach(cell => cell.style.setProperty("--row", slider.value));
    document.getElementById("caption").textContent = captions[slider.value];
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = 0;
    button.textContent = "Stop";
    show();
    timer = setInterval(() => { slider.value = +slider.value + 1; show(); if (slider.value === slider.max) stop(); }, 200);
  });
  document.getElementById("controls").classList.add("live");
})();
