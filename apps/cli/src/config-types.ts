/** Kinds of values that several keys of a run file take. */
import { z } from 'zod';

/** A whole number, 1 or more. */
export const count = (): z.ZodInt => z.int().min(1);
/** A share, above 0 and below 1. */
export const share = (): z.ZodNumber => z.number().gt(0).lt(1);
/** A text that is not empty. */
export const text = (): z.ZodString => z.string().min(1);
/** A text or a list of texts. */
export const names = (): z.ZodUnion<[z.ZodString, z.ZodArray<z.ZodString>]> =>
  z.union([text(), z.array(text()).min(1)]);
/** Steps, or a share of all steps. */
export const stepsOrShare = (): z.ZodUnion<[z.ZodInt, z.ZodNumber]> => z.union([count(), share()]);

/** Whether a value of a YAML file is a map. */
export function isMap(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value) && !(value instanceof Date);
}
