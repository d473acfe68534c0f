/**
 * Lexical ownership. The garbage collector does not see GPU memory, so a tensor made inside `scope(fn)` is freed at
 * the scope's end unless it is part of `fn`'s result, which then belongs to the enclosing scope, or to the caller.
 */
import { LifetimeError } from './errors.js';

/** Something that a scope frees. */
export abstract class Owned {
  /** Gives the memory back; using the object afterwards is an error. */
  abstract dispose(): void;
}

const stack: Set<Owned>[] = [];

/** Depth of open scopes; 0 outside any. */
export function scopeDepth(): number {
  return stack.length;
}

/** Registers a new object with the innermost scope, if there is one. */
export function own<T extends Owned>(x: T): T {
  stack[stack.length - 1]?.add(x);
  return x;
}

/**
 * Runs `fn` and frees every tensor made inside, unless it is in the result (a tensor, or arrays and plain objects of
 * them). Ops never await, so `fn` must be synchronous: read back outside of the scope.
 * @throws LifetimeError when `fn` returns a promise; everything made inside is freed then too.
 */
export function scope<T>(fn: () => T): T {
  const owned = new Set<Owned>();
  stack.push(owned);
  const kept = new Set<Owned>();
  try {
    const result = fn();
    if (typeof result === 'object' && result !== null && typeof Reflect.get(result, 'then') === 'function') {
      throw new LifetimeError(
        'scope(async ...): a scope ends when its function returns, so its tensors would be freed while the promise ' +
          'still runs; build the tensors inside, return them, and read them after the scope',
      );
    }
    visit(result, (x) => kept.add(x));
    return result;
  } finally {
    stack.pop();
    const parent = stack[stack.length - 1];
    for (const x of owned) {
      if (!kept.has(x)) x.dispose();
      else parent?.add(x);
    }
  }
}

/** Takes everything in `x` out of its scopes: the caller owns it now and must call `dispose()`. */
export function keep<T>(x: T): T {
  visit(x, (owned) => {
    for (const scopeSet of stack) scopeSet.delete(owned);
  });
  return x;
}

function visit(x: unknown, each: (owned: Owned) => void): void {
  if (x instanceof Owned) each(x);
  else if (Array.isArray(x)) for (const item of x) visit(item, each);
  else if (x instanceof Map) for (const item of x.values()) visit(item, each);
  else if (typeof x === 'object' && x !== null && Object.getPrototypeOf(x) === Object.prototype)
    for (const item of Object.values(x)) visit(item, each);
}
