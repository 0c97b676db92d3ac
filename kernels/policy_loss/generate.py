"""Makes csrc/cpu/token_program-inl.h from triton_program.py: `python -m ...generate FILE`.

The CPU kernels include it once for each instruction set, where F is a register of floats, and the
CUDA kernel of the losses' rows with F a float; both say what EAPO_INLINE is.

What it understands: functions of blocks with one `return` at the end; assignments; `if` over
constants in capitals; arithmetic, comparisons, `&`; and the functions of `_CALLS`. SURROGATE
becomes a template argument, so that its branches are compiled apart; the other constants become
arguments, whose branches are taken once for all lanes.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path

SOURCE = Path(__file__).with_name("triton_program.py")

_HEADER = """\
// The token program for one register of tokens on a CPU (F, masks I), for one token on a GPU. Made
// from kernels/policy_loss/triton_program.py by `python -m eapo_fast.kernels.policy_loss.generate`;
// change that file, not this one.
"""
_CALLS = {
    "tl.where": "select",
    "tl.exp": "exp_limited",
    "tl.abs": "absolute",
    "bounded": "bounded",
    "exp_excess": "exp_excess",
    "expm1": "expm1",
    "filled": "filled",
}
_SYMBOLS = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.BitAnd: "&", ast.Lt: "<", ast.Gt: ">",
    ast.Eq: "==", ast.NotEq: "!=",
}  # fmt: skip
_CONSTANTS = {
    "CLIP": "Surrogate::kClip", "DETACHED_CLIP": "Surrogate::kDetachedClip",
    "NONE": "Surrogate::kNone", "REINFORCE": "Surrogate::kReinforce",
    "K1": "KlEstimator::kK1", "ABS": "KlEstimator::kAbs", "K2": "KlEstimator::kK2",
    "K3": "KlEstimator::kK3",
}  # fmt: skip
_FLAGS = {"KL": "KlEstimator"}
_SCALARS = ("limit", "least", "most", "delta", "beta", "entropy_coef")
_MASKS = ("moves",)


class _Function:
    """One function on its way to C++; `outputs` are the types of what others return."""

    def __init__(self, node: ast.FunctionDef, outputs: dict[str, list[str]]) -> None:
        self.node, self.outputs = node, outputs
        self.types = {a.arg: _type_of_argument(a.arg) for a in node.args.args}
        self.locals: dict[str, str] = {}
        self.results: list[str] = []

    def text(self) -> str:
        body = [b for b in self.node.body if not _is_text(b)]
        lines = [line for statement in body for line in self.statement(statement, 1)]
        declared = [
            f"  {kind} {', '.join(f'{n}{{}}' for n, k in self.locals.items() if k == kind)};"
            for kind in ("F", "I")
            if kind in self.locals.values()
        ]
        arguments = [self.argument(a.arg) for a in self.node.args.args if a.arg != "SURROGATE"]
        arguments += [f"{kind}& out{i}" for i, kind in enumerate(self.results)]
        templates = [a.arg for a in self.node.args.args if a.arg == "SURROGATE"]
        head = f"EAPO_INLINE void {self.node.name}({', '.join(arguments)}) {{"
        note = ast.get_docstring(self.node)
        template = ["template <Surrogate SURROGATE>"] if templates else []
        return "\n".join([f"// {note}", *template, head, *declared, *lines, "}"])

    def argument(self, name: str) -> str:
        kind = self.types[name]
        return f"{'float' if kind == 'S' else kind} {name}"

    def statement(self, node: ast.stmt, depth: int) -> list[str]:
        pad = "  " * depth
        if isinstance(node, ast.Return):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            found = [self.expression(v) for v in values if v is not None]
            self.results = [kind for _, kind in found]
            self.outputs[self.node.name] = self.results
            return [f"{pad}out{i} = {text};" for i, (text, _) in enumerate(found)]
        if isinstance(node, ast.If):
            return self.branch(node, depth)
        assert isinstance(node, ast.Assign)
        target = node.targets[0]
        if isinstance(target, ast.Tuple):
            return [pad + self.call_with_results(target, node.value)]
        assert isinstance(target, ast.Name)
        text, kind = self.expression(node.value)
        self.declare(target.id, kind)
        return [f"{pad}{target.id} = {text};"]

    def branch(self, node: ast.If, depth: int) -> list[str]:
        pad, (test, _) = "  " * depth, self.expression(node.test)
        word = "if constexpr" if "SURROGATE" in test else "if"
        lines = [f"{pad}{word} ({test}) {{"]
        lines += [line for s in node.body for line in self.statement(s, depth + 1)]
        if node.orelse:
            inner = [line for s in node.orelse for line in self.statement(s, depth + 1)]
            lines += [f"{pad}}} else {{", *inner]
        return [*lines, f"{pad}}}"]

    def call_with_results(self, target: ast.Tuple, value: ast.expr) -> str:
        assert isinstance(value, ast.Call)
        assert isinstance(value.func, ast.Name)
        names = [t.id for t in target.elts if isinstance(t, ast.Name)]
        for name, kind in zip(names, self.outputs[value.func.id], strict=True):
            self.declare(name, kind)
        given = [ast.unparse(a) for a in value.args]
        template = "<SURROGATE>" if "SURROGATE" in given else ""
        passed = [g for g in given if g != "SURROGATE"]
        return f"{value.func.id}{template}({', '.join(passed + names)});"

    def declare(self, name: str, kind: str) -> None:
        self.types[name] = self.locals[name] = kind

    def expression(self, node: ast.expr) -> tuple[str, str]:
        """Return the C++ text and its type: F, I, or S for a scalar."""
        if isinstance(node, ast.Constant):
            return f"{float(node.value)!r}f", "S"  # type: ignore[arg-type]
        if isinstance(node, ast.Name):
            return _CONSTANTS.get(node.id, node.id), self.types.get(node.id, "constant")
        if isinstance(node, ast.UnaryOp):
            text, kind = self.expression(node.operand)
            return f"-{text}", kind
        if isinstance(node, ast.Compare):
            left, right = self.expression(node.left)[0], self.expression(node.comparators[0])[0]
            return f"({left} {_SYMBOLS[type(node.ops[0])]} {right})", "I"
        if isinstance(node, ast.BinOp):
            (left, first), (right, second) = self.expression(node.left), self.expression(node.right)
            kind = next((k for k in (first, second) if k != "S"), "S")
            return f"({left} {_SYMBOLS[type(node.op)]} {right})", kind
        assert isinstance(node, ast.Call)
        name = ast.unparse(node.func)
        if name == "float":
            return "kInf", "S"
        found = [self.expression(a) for a in node.args]
        wide = [f"broadcast({text})" if kind == "S" else text for text, kind in found]
        return f"{_CALLS[name]}({', '.join(wide)})", "F"


def generate(source: str) -> str:
    """Return the C++ of the token program."""
    outputs: dict[str, list[str]] = {}
    functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    text = "\n\n".join([_HEADER.rstrip(), *(_Function(f, outputs).text() for f in functions)])
    return "".join(f"{_wrapped(line)}\n" for line in text.split("\n"))


def _wrapped(line: str) -> str:
    """Break a long line between arguments."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(
        line, 100, subsequent_indent=indent, break_long_words=False, replace_whitespace=False
    )


def _type_of_argument(name: str) -> str:
    if name.isupper():
        return _FLAGS.get(name, "bool")
    return "S" if name in _SCALARS else "I" if name in _MASKS else "F"


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(generate(SOURCE.read_text()))
