const box = document.getElementById('search'), cards = [...document.querySelectorAll('.prompt')], found = document.getElementById('found');
const texts = cards.map(c => c.textContent.toLowerCase());
function search() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let n = 0;
  cards.forEach((c, i) => { const on = words.every(w => texts[i].includes(w)); c.hidden = !on; n += on; });
  found.textContent = `${n} of ${cards.length} prompts`;
}
if (box) {
  box.addEventListener('input', search);
  box.addEventListener('keydown', e => { if (e.key === 'Escape') { box.value = ''; search(); } });
  document.addEventListener('keydown', e => { if (e.key === '/' && document.activeElement !== box) { e.preventDefault(); box.focus(); } });
  search();
}
if (document.body.dataset.running) setInterval(() => { if (!box || !box.value) location.reload(); }, 30000);
