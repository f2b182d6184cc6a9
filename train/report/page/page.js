// The tables of classes: rows are made as they are shown, so that a page with thousands of classes opens at once.
'use strict';
const FIRST = 25, STEP = 500;
for (const section of document.querySelectorAll('.classes')) {
  const data = JSON.parse(section.querySelector('script').textContent);
  const table = section.querySelector('table'), body = table.querySelector('tbody');
  const heads = [...table.querySelectorAll('thead th')];
  const search = section.querySelector('input'), group = section.querySelector('select');
  const status = section.querySelector('.count'), more = section.querySelector('.more');
  const accuracy = (method, k) => data.test[k] ? data.correct[method][k] / data.test[k] : null;
  const names = new Intl.Collator(undefined, { numeric: true });
  const values = [
    k => data.name[k], k => data.group[k], k => data.train[k], k => data.test[k],
    ...data.correct.map((_, method) => k => accuracy(method, k)),
  ];
  let column = 2, direction = -1, shown = FIRST, rows = [];

  function compare(a, b) {
    const x = values[column](a), y = values[column](b);
    if (x === null || y === null) return (x === null) - (y === null);  // classes without test samples come last
    return direction * (column ? x - y : names.compare(x, y)) || a - b;
  }
  function find() {
    const text = search.value.trim().toLowerCase();
    rows = data.name.map((_, k) => k).filter(k =>
      data.name[k].toLowerCase().includes(text) && (group.value === '' || data.group[k] === Number(group.value)));
    rows.sort(compare);
    heads.forEach((head, i) => {
      if (i === column) head.setAttribute('aria-sort', direction > 0 ? 'ascending' : 'descending');
      else head.removeAttribute('aria-sort');
    });
    show(FIRST);
  }
  function show(count) {
    shown = Math.min(count, rows.length);
    body.replaceChildren(...rows.slice(0, shown).map(row));
    status.textContent = `${shown.toLocaleString('en')} of ${rows.length.toLocaleString('en')} classes shown`;
    more.hidden = shown === rows.length;
  }
  function row(k) {
    const line = document.createElement('tr'), name = document.createElement('th'), text = document.createElement('bdi');
    name.scope = 'row';
    text.textContent = data.name[k];
    name.append(text);
    line.append(name);
    const shares = data.correct.map((_, method) => accuracy(method, k));
    for (const value of [data.groups[data.group[k]], data.train[k].toLocaleString('en'), data.test[k].toLocaleString('en'),
      ...shares.map(share => share === null ? '–' : (100 * share).toFixed(1))]) {
      line.insertCell().textContent = value;
    }
    return line;
  }
  heads.forEach((head, i) => head.querySelector('button').addEventListener('click', () => {
    direction = i === column ? -direction : (i > 1 ? -1 : 1);
    column = i;
    find();
  }));
  search.addEventListener('input', find);
  group.addEventListener('change', find);
  more.querySelector('button').addEventListener('click', () => show(shown + STEP));
  for (const part of [table, section.querySelector('.tools'), section.querySelector('.note')]) part.hidden = false;
  find();
}
