import { EventEmitter } from 'node:events';
import { expect, it } from 'vitest';
import { InterruptedError } from './errors.js';
import { watchInterrupt } from './interrupt.js';

it('the first Ctrl-C asks, the second stops with 130', () => {
  const exits: number[] = [];
  const source = Object.assign(new EventEmitter(), { exit: (code: number) => exits.push(code) });
  let told = 0;
  const watch = watchInterrupt(() => told++, source);
  expect(watch.signal.aborted).toBe(false);
  source.emit('SIGINT');
  expect(watch.signal.aborted).toBe(true);
  expect(watch.signal.reason).toBeInstanceOf(InterruptedError);
  expect([told, exits]).toEqual([1, []]);
  source.emit('SIGINT');
  expect([told, exits]).toEqual([1, [130]]);
  watch.stop();
  expect(source.listenerCount('SIGINT') + source.listenerCount('SIGTERM')).toBe(0);
});
