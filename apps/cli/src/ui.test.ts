import { describe, expect, it } from 'vitest';
import { formatTable, type Io, Ui, visibleLength } from './ui.js';

interface Recorded extends Io {
  out: string;
  err: string;
}

function io(options: { tty?: boolean; env?: Record<string, string>; columns?: number } = {}): Recorded {
  const recorded: Recorded = {
    out: '',
    err: '',
    stdout: { isTTY: options.tty, write: (text: string) => (recorded.out += text) },
    stderr: { isTTY: options.tty, columns: options.columns, write: (text: string) => (recorded.err += text) },
    env: options.env ?? {},
  };
  return recorded;
}

describe('Ui', () => {
  it('writes for people to stdout, and to stderr with --json', () => {
    const plain = io();
    new Ui(plain).line('words');
    expect([plain.out, plain.err]).toEqual(['words\n', '']);
    const json = io();
    const ui = new Ui(json, { json: true });
    ui.line('words');
    ui.data({ a: 1 });
    expect([json.out, json.err]).toEqual(['{"a":1}\n', 'words\n']);
  });

  it('colours on a terminal alone, and never with NO_COLOR', () => {
    expect(new Ui(io({ tty: true })).colors.red('x')).toContain('\u001b[31m');
    expect(new Ui(io()).colors.red('x')).toBe('x');
    expect(new Ui(io({ tty: true, env: { NO_COLOR: '1' } })).colors.red('x')).toBe('x');
    expect(new Ui(io({ tty: true, env: { TERM: 'dumb' } })).colors.red('x')).toBe('x');
  });

  it('shows progress as a bar that gives way to lines on a terminal', () => {
    let now = 0;
    const recorded = io({ tty: true, columns: 60 });
    const ui = new Ui(recorded, { now: () => now });
    const progress = ui.progress('download', { total: 100 });
    progress.update(10);
    expect(recorded.err).toBe('');
    now = 1000;
    progress.update(50, 'a.bin');
    // Cut at 59 of 60 columns, so that the cursor stays on the line.
    expect(recorded.err).toBe('\r\u001b[Kdownload  [============            ]  50%  50 of 100  a.bin');
    recorded.err = '';
    ui.line('row');
    expect(recorded.out).toBe('row\n');
    expect(recorded.err.startsWith('\r\u001b[Kdownload')).toBe(true);
    recorded.err = '';
    now = 1010;
    progress.update(60);
    expect(recorded.err).toBe('');
    progress.done();
    expect(recorded.err).toBe('\r\u001b[K');
    progress.update(100);
    expect(recorded.err).toBe('\r\u001b[K');
  });

  it('shows progress as a line every few seconds elsewhere', () => {
    let now = 0;
    const recorded = io();
    const progress = new Ui(recorded, { now: () => now }).progress('download', { total: 200, format: (n) => `${n} B` });
    for (now = 0; now <= 12_000; now += 100) progress.update(now / 100);
    expect(recorded.err).toBe('download  25%  50 B of 200 B  eta 15s\ndownload  50%  100 B of 200 B  eta 10s\n');
    progress.done('downloaded');
    expect(recorded.err).toMatch(/\ndownloaded\n$/);
  });

  it('sets tables by what is visible', () => {
    expect(visibleLength('\u001b[31mab\u001b[39m')).toBe(2);
    expect(
      formatTable(
        [
          ['name', 'rank'],
          ['\u001b[31mq\u001b[39m', '8'],
        ],
        ['left', 'right'],
      ),
    ).toBe('name  rank\n\u001b[31mq\u001b[39m        8');
  });
});
