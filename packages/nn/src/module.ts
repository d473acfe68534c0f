/** Modules are plain fields: the path of a field is its name in the checkpoint. No proxy, no registration. */
import { LorikeetError, Tensor } from '@lorikeet/tensor';

/** `model.layers.0.self_attn` and the like: field names joined by dots, array indices as numbers. */
export type Path = string;

/**
 * A part of a model that owns its parameters. Subclasses hold tensors, modules and arrays of modules in public fields;
 * private (`#`) fields are not seen, which is how a tied weight is kept from being counted twice.
 */
export abstract class Module {
  /** Direct children by field name. */
  *children(): Generator<[name: string, child: Module]> {
    for (const [name, value] of Object.entries(this)) {
      if (value instanceof Module) yield [name, value];
      else if (Array.isArray(value)) {
        for (const [i, item] of value.entries()) if (item instanceof Module) yield [`${name}.${i}`, item];
      }
    }
  }

  /** This module (path '') and all below it, in field order. */
  *namedModules(prefix: Path = ''): Generator<[path: Path, module: Module]> {
    yield [prefix, this];
    for (const [name, child] of this.children()) yield* child.namedModules(prefix === '' ? name : `${prefix}.${name}`);
  }

  /** All parameters by path, in field order. */
  *namedParameters(): Generator<[path: Path, parameter: Tensor]> {
    for (const [path, module] of this.namedModules()) {
      for (const [name, value] of Object.entries(module)) {
        if (value instanceof Tensor) yield [path === '' ? name : `${path}.${name}`, value];
      }
    }
  }

  /** The module at a path. @throws LorikeetError that names the part of the path which is not there, and what is. */
  at(path: Path): Module {
    if (path === '') return this;
    const found = [...this.children()].find(([name]) => path === name || path.startsWith(`${name}.`));
    if (found === undefined) {
      const there = [...this.children()].map(([name]) => name).join(', ');
      throw new LorikeetError(`no module "${path}" here; there is ${there || 'none'}`);
    }
    return found[1].at(path.slice(found[0].length + 1));
  }

  /**
   * Puts another module in place of the one at `path` and gives back the old one, which is not disposed: a wrapper holds it.
   * @throws LorikeetError when the path has no module
   */
  replace(path: Path, next: Module): Module {
    const old = this.at(path);
    const parts = path.split('.');
    const name = parts.pop() ?? '';
    if (/^\d+$/.test(name)) {
      const list: unknown = Reflect.get(this.at(parts.slice(0, -1).join('.')), parts[parts.length - 1]);
      if (Array.isArray(list)) list[Number(name)] = next;
    } else Reflect.set(this.at(parts.join('.')), name, next);
    return old;
  }

  /** Number of elements of all parameters. */
  get parameterCount(): number {
    let count = 0;
    for (const [, p] of this.namedParameters()) count += p.size;
    return count;
  }

  /** Frees all parameters. A module that holds tensors in private fields adds them. */
  dispose(): void {
    for (const [, child] of this.children()) child.dispose();
    for (const value of Object.values(this)) if (value instanceof Tensor) value.dispose();
  }
}

/** A module from one tensor to one tensor: what a PEFT method wraps. */
export abstract class Layer extends Module {
  /** x: [..., D] -> [..., O] */
  abstract forward(x: Tensor): Tensor;
}
