/** Ctrl-C: the first one asks the command to stop cleanly, the second one stops at once. */
import { EXIT, InterruptedError } from './errors.js';

/** The part of `process` that is needed; tests give their own. */
export interface SignalSource {
  on(event: 'SIGINT' | 'SIGTERM', listener: () => void): unknown;
  off(event: 'SIGINT' | 'SIGTERM', listener: () => void): unknown;
  exit(code: number): unknown;
}

/** A running watch for Ctrl-C. */
export interface InterruptWatch {
  /** Aborted by the first Ctrl-C (or SIGTERM), with an {@link InterruptedError} as reason. */
  readonly signal: AbortSignal;
  /** Gives Ctrl-C back its usual meaning. */
  stop(): void;
}

/**
 * Watches for Ctrl-C and SIGTERM.
 * @param onFirst called at the first one, to tell the user what happens now
 */
export function watchInterrupt(onFirst: () => void, source: SignalSource = process): InterruptWatch {
  const controller = new AbortController();
  const listener = (): void => {
    if (controller.signal.aborted) {
      source.exit(EXIT.interrupted);
      return;
    }
    controller.abort(new InterruptedError());
    onFirst();
  };
  source.on('SIGINT', listener);
  source.on('SIGTERM', listener);
  return {
    signal: controller.signal,
    stop(): void {
      source.off('SIGINT', listener);
      source.off('SIGTERM', listener);
    },
  };
}
