import type { RowPreview } from '@lorikeet/trainer';
import { describe, expect, it } from 'vitest';
import { previewLegend, renderPreview, trainsItsEnd } from './mask-preview.js';
import { Ui } from './ui.js';

function uiOf(isTTY: boolean): Ui {
  const stream = { write: () => true, isTTY };
  return new Ui({ stdout: stream, stderr: stream, env: {} });
}

const row: RowPreview = {
  segments: [
    { text: '<s>', ids: [1], kind: 'special', terminator: false },
    { text: 'long ', ids: [5], kind: 'truncated', terminator: false },
    { text: 'Input: up\nAnswer:', ids: [6, 7], kind: 'masked', terminator: false },
    { text: ' good', ids: [8], kind: 'trained', terminator: false },
    { text: '</s>', ids: [2], kind: 'trained', terminator: true },
  ],
  counts: { special: 1, truncated: 1, masked: 2, trained: 2 },
};

describe('renderPreview', () => {
  it('sets trained, end and cut text in brackets where there is no colour', () => {
    expect(renderPreview(uiOf(false), row)).toBe(
      '<s>‹long ›Input: up↵\nAnswer:⟦ good⟧⟪</s>⟫\n5 tokens: 2 trained, 1 cut off',
    );
    expect(previewLegend(uiOf(false))).toBe('⟦trained⟧  ⟪trained end⟫  read, not trained  ‹cut off›');
  });

  it('colours every kind differently, and ends a colour with its line', () => {
    const text = renderPreview(uiOf(true), row);
    expect(text).not.toMatch(/[⟦⟪‹]/);
    expect(text).toContain('\u001b[32m good\u001b[39m');
    expect(text).toContain('\u001b[2mInput: up↵\u001b[22m\n\u001b[2mAnswer:\u001b[22m');
    const codes = ['<s>', 'long ', 'Answer:', ' good', '</s>'].map((part) => {
      const pieces = text.slice(0, text.indexOf(part)).split('\u001b');
      return pieces.slice(pieces.findLastIndex((piece) => !/^\[\d+m$/.test(piece)) + 1).join();
    });
    expect(new Set(codes).size).toBe(5);
  });

  it('writes control characters of the data as escapes', () => {
    const bad: RowPreview = {
      segments: [{ text: 'a\u001b[31mb\u202e', ids: [1], kind: 'masked', terminator: false }],
      counts: { special: 0, truncated: 0, masked: 1, trained: 0 },
      problem: 'the completion is\u001b[2J empty',
    };
    const text = renderPreview(uiOf(false), bad);
    expect(text).toBe('a\\x1b[31mb\\u202e\n1 token: 0 trained\nnot trained on: the completion is\\x1b[2J empty');
  });

  it('tells whether a row trains its end', () => {
    expect(trainsItsEnd(row)).toBe(true);
    expect(trainsItsEnd({ ...row, segments: row.segments.slice(0, -1) })).toBe(false);
    expect(trainsItsEnd({ segments: [], counts: { special: 0, truncated: 0, masked: 0, trained: 0 } })).toBe(false);
  });
});
