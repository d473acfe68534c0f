#!/usr/bin/env node
import { CliError, EXIT, errorMessage, InterruptedError } from '../errors.js';
import { watchInterrupt } from '../interrupt.js';
import { Ui } from '../ui.js';
import { runDemo } from './run.js';

const io = { stdout: process.stdout, stderr: process.stderr, env: process.env };
const ui = new Ui(io);
const watch = watchInterrupt(() => ui.note('stopping; press Ctrl-C again to stop at once'));
try {
  await runDemo({ ui, io, signal: watch.signal }, { output: 'out/demo' });
} catch (error) {
  ui.clear();
  console.error(error instanceof InterruptedError ? error.message : `error: ${errorMessage(error)}`);
  process.exitCode = error instanceof CliError ? error.exitCode : EXIT.failed;
} finally {
  watch.stop();
}
