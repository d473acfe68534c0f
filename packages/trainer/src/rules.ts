/** What settings may be: tests with the words for them, so that one message names everything that is wrong. */

/** What a setting may be: the test, and the words for it in a message, such as `a share from 0 to 1`. */
export type Rule = readonly [allows: (value: unknown) => boolean, allowed: string];

/** @internal */
export const number = (allows: (value: number) => boolean, allowed: string): Rule => [
  (value) => typeof value === 'number' && Number.isFinite(value) && allows(value),
  allowed,
];
/** @internal */
export const whole = (least: number, allowed = `a whole number, at least ${least}`): Rule =>
  number((value) => Number.isSafeInteger(value) && value >= least, allowed);
/** @internal */
export const notNegative: Rule = number((value) => value >= 0, 'a finite number, at least 0');
/** @internal */
export const positive: Rule = number((value) => value > 0, 'a finite number above 0');
/** @internal */
export const finite: Rule = number(() => true, 'a finite number');
/** @internal */
export const share: Rule = number((value) => value >= 0 && value <= 1, 'a share from 0 to 1');
/** @internal */
export const flag: Rule = [(value) => typeof value === 'boolean', 'true or false'];
/** @internal */
export const oneOf = (words: readonly string[]): Rule => [
  (value) => words.some((word) => word === value),
  `one of ${words.join(', ')}`,
];

/** @internal */
export const orNull = ([allows, allowed]: Rule): Rule => [
  (value) => value === null || allows(value),
  `${allowed}, or null`,
];

/** A value as a message shows it. @internal */
export const show = (value: unknown): string => (typeof value === 'string' ? JSON.stringify(value) : String(value));

/** What is wrong with the settings that a table knows; those that are left out have their defaults. @internal */
export function problems(args: object, table: Readonly<Record<string, Rule>>, prefix = ''): string[] {
  return Object.entries(table).flatMap(([name, [allows, allowed]]) => {
    const value: unknown = Reflect.get(args, name);
    return value === undefined || allows(value) ? [] : [`${prefix}${name} is ${show(value)}; it must be ${allowed}`];
  });
}
