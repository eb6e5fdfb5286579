// One picture field: a canvas to draw on, drop on and paste into, or to mark tokens on. The field's value is
// JSON, {image: data URL, marked: [token, ...]}; the server answers an upload with the image that the flow sees.
const stage = element.querySelector('.fb-stage');
const canvas = element.querySelector('canvas');
const pen = canvas.getContext('2d');
const note = element.querySelector('.fb-note');
const file = element.querySelector('input[type=file]');
const boxes = [...element.querySelectorAll('.fb-tokens input')];
const most = Number(stage.dataset.mostBytes);
let image = '';

const marked = () => boxes.flatMap((box, token) => (box.checked ? [token] : []));
const keep = () => {
  stage.classList.toggle('fb-filled', image !== '');
  props.value = JSON.stringify({ image, marked: marked() });
};
const blank = () => { pen.fillStyle = '#000'; pen.fillRect(0, 0, canvas.width, canvas.height); };

function show(url) {
  const picture = new Image();
  picture.onload = () => {
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  };
  picture.src = url;
}

function take(blob) {
  if (!blob) return;
  if (blob.size > most) {
    note.textContent = `This file is larger than ${most / 2 ** 20} MB; choose a smaller one.`;
    return;
  }
  const reader = new FileReader();
  reader.onload = () => {
    note.textContent = '';
    image = String(reader.result).replace(/^data:[^,]*,/, 'data:;base64,');
    keep();
    trigger('upload');
  };
  reader.readAsDataURL(blob);
}

watch('value', () => {
  const field = JSON.parse(props.value || '{}');
  if (field.error) note.textContent = field.error;
  if ((field.image || '') === image) return;
  image = field.image || '';
  stage.classList.toggle('fb-filled', image !== '');
  if (image) show(image); else blank();
});

element.querySelector('.fb-open').addEventListener('click', () => file.click());
file.addEventListener('change', () => { take(file.files[0]); file.value = ''; });
element.querySelector('.fb-clear').addEventListener('click', () => {
  blank(); image = ''; note.textContent = '';
  boxes.forEach((box) => { box.checked = false; });
  keep();
});
stage.addEventListener('dragover', (event) => { event.preventDefault(); stage.classList.add('fb-over'); });
stage.addEventListener('dragleave', () => stage.classList.remove('fb-over'));
stage.addEventListener('drop', (event) => {
  event.preventDefault();
  stage.classList.remove('fb-over');
  take(event.dataTransfer.files[0]);
});
stage.addEventListener('paste', (event) => take([...event.clipboardData.files][0]));

if (boxes.length) { // mark tokens: tap, drag, or space
  let state = null;
  const side = Math.round(Math.sqrt(boxes.length));
  const at = (event) => {
    const box = document.elementFromPoint(event.clientX, event.clientY);
    return boxes.includes(box) ? box : null;
  };
  stage.addEventListener('pointerdown', (event) => {
    const box = at(event);
    if (!box) return;
    event.preventDefault();
    box.focus();
    state = !box.checked;
    box.checked = state;
  });
  stage.addEventListener('pointermove', (event) => {
    const box = state === null ? null : at(event);
    if (box) box.checked = state;
  });
  window.addEventListener('pointerup', () => { if (state !== null) { state = null; keep(); } });
  stage.addEventListener('click', (event) => { if (event.detail) event.preventDefault(); }); // pointers did it
  boxes.forEach((box, token) => {
    box.addEventListener('change', keep);
    box.addEventListener('keydown', (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -side, ArrowDown: side }[event.key];
      const next = step && boxes[token + step];
      if (!next) return;
      event.preventDefault();
      box.tabIndex = -1; next.tabIndex = 0; next.focus();
    });
    box.tabIndex = token ? -1 : 0; // one stop for Tab; arrows go on from there
  });
  element.querySelectorAll('[data-region]').forEach((button) => button.addEventListener('click', () => {
    const inner = (place) => place >= side / 4 && place < (3 * side) / 4;
    const regions = {
      left: (row, column) => column < side / 2,
      right: (row, column) => column >= side / 2,
      top: (row) => row < side / 2,
      bottom: (row) => row >= side / 2,
      middle: (row, column) => inner(row) && inner(column),
    };
    const inside = regions[button.dataset.region];
    boxes.forEach((box, token) => { box.checked = inside(Math.floor(token / side), token % side); });
    keep();
  }));
} else { // draw
  let from = null;
  const place = (event) => {
    const frame = canvas.getBoundingClientRect();
    const scale = canvas.width / frame.width;
    return [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
  };
  const stroke = (to) => {
    pen.strokeStyle = element.querySelector('.fb-colour').value;
    pen.lineWidth = element.querySelector('.fb-width').value * canvas.width / 100;
    pen.lineCap = 'round';
    pen.beginPath(); pen.moveTo(...from); pen.lineTo(...to); pen.stroke();
    from = to;
  };
  canvas.addEventListener('pointerdown', (event) => {
    canvas.setPointerCapture(event.pointerId);
    stage.classList.add('fb-filled');
    canvas.focus();
    from = place(event);
    stroke(from);
  });
  canvas.addEventListener('pointermove', (event) => { if (from) stroke(place(event)); });
  canvas.addEventListener('pointerup', () => { from = null; image = canvas.toDataURL('image/png'); keep(); });
}
blank();
