/**
 * Philox4x32-10, a counter-based random generator: the numbers of a counter and a key, without state.
 * Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011 (Random123).
 */
import { defineKernel, type Kernel } from '../kernel.js';

/** WGSL `philox(counter: vec4<u32>, key: vec2<u32>) -> vec4<u32>`. WGSL has no high half of a product, so it is put together. */
export const philoxSource = `
fn mul_high(a: u32, b: u32) -> u32 {
  let a0 = a & 0xffffu; let a1 = a >> 16u; let b0 = b & 0xffffu; let b1 = b >> 16u;
  let low = a0 * b0; let mid = a1 * b0 + (low >> 16u);
  let cross = a0 * b1 + (mid & 0xffffu);
  return a1 * b1 + (mid >> 16u) + (cross >> 16u);
}
fn philox(counter: vec4<u32>, key: vec2<u32>) -> vec4<u32> {
  var c = counter;
  var k = key;
  for (var round = 0u; round < 10u; round++) {
    c = vec4<u32>(mul_high(0xCD9E8D57u, c.z) ^ c.y ^ k.x, 0xCD9E8D57u * c.z, mul_high(0xD2511F53u, c.x) ^ c.w ^ k.y, 0xD2511F53u * c.x);
    k += vec2<u32>(0x9E3779B9u, 0xBB67AE85u);
  }
  return c;
}`;

/** Numbers of given counters and keys, six words each (counter, key); for the known-answer test. */
export const philoxKernel: Kernel = defineKernel({
  name: 'philox',
  bindings: { words: 'read', out: 'write' },
  params: { count: 'u32' },
  workgroupSize: 64,
  body: `${philoxSource}
fn kernel(group: u32, lane: u32) {
  let i = group * WORKGROUP + lane;
  if (i >= P.count) { return; }
  let at = i * 6u;
  let r = philox(
    vec4<u32>(words_load(at), words_load(at + 1u), words_load(at + 2u), words_load(at + 3u)),
    vec2<u32>(words_load(at + 4u), words_load(at + 5u)));
  for (var c = 0u; c < 4u; c++) { out_store(i * 4u + c, r[c]); }
}`,
});

/** High half of a 64-bit product: partial products of 16 by 32 bits are exact in doubles. */
function mulHigh(a: number, b: number): number {
  return Math.floor(((a >>> 16) * b + Math.floor(((a & 0xffff) * b) / 65536)) / 65536);
}

/** Philox4x32-10 on the host. Counter of 4 words, key of 2 words -> 4 words. */
export function philox(counter: readonly number[], key: readonly number[]): [number, number, number, number] {
  let [c0, c1, c2, c3] = counter.map((v) => v >>> 0);
  let [k0, k1] = key.map((v) => v >>> 0);
  for (let round = 0; round < 10; round++) {
    const high0 = mulHigh(0xd2511f53, c0);
    const low0 = Math.imul(0xd2511f53, c0) >>> 0;
    const high1 = mulHigh(0xcd9e8d57, c2);
    const low1 = Math.imul(0xcd9e8d57, c2) >>> 0;
    [c0, c1, c2, c3] = [(high1 ^ c1 ^ k0) >>> 0, low1, (high0 ^ c3 ^ k1) >>> 0, low0];
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}
