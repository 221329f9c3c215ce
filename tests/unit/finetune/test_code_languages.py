"""Functions of other languages than Python, by their grammars."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage.tools.finetune.code_data import CodePair, build_code_pairs
from sage_contracts.errors import InvalidDataError

SOURCES = {
    "go": """package shapes

// Area gives the area of a circle,
// in square metres.
func (c *Circle) Area(scale float64) float64 {
	radius := c.radius * scale
	// halves are never rounded
	return math.Pi * radius * radius
}
""",
    "rs": """impl Circle {
    /// Area gives the area of a circle,
    /// in square metres.
    #[inline]
    pub fn area(&self, scale: f64) -> f64 {
        let radius = self.radius * scale;
        // halves are never rounded
        std::f64::consts::PI * radius * radius
    }
}
""",
    "java": """class Circle {
    /**
     * Area gives the area of a circle,
     * in square metres.
     */
    public double area(double scale) {
        double radius = this.radius * scale;
        // halves are never rounded
        return Math.PI * radius * radius;
    }
}
""",
    "js": """/**
 * Area gives the area of a circle,
 * in square metres.
 */
export function area(circle, scale) {
  const radius = circle.radius * scale;
  // halves are never rounded
  return Math.PI * radius * radius;
}
""",
    "ts": """export class Circle {
  /** Area gives the area of a circle,
   * in square metres. */
  area(scale: number): number {
    const radius = this.radius * scale;
    // halves are never rounded
    return Math.PI * radius * radius;
  }
}
""",
}
LANGUAGES = {"go": "Go", "rs": "Rust", "java": "Java", "js": "JavaScript", "ts": "TypeScript"}


def by_kind(path: Path) -> dict[str, CodePair]:
    kinds = ["docstring_body", "signature_body", "fill_middle", "question_code"]
    return {pair.kind: pair for pair in build_code_pairs(path, kinds)}  # type: ignore[arg-type]


def unfenced(text: str) -> str:
    """What stands between the fences."""
    return text.split("```", 1)[1].split("\n", 1)[1].removesuffix("\n```")


@pytest.mark.parametrize("suffix", SOURCES)
def test_a_documented_function_is_asked_about_in_every_way(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"circle.{suffix}"
    path.write_text(SOURCES[suffix])
    pairs = by_kind(tmp_path)
    assert set(pairs) == {"docstring_body", "fill_middle", "question_code"}
    body = pairs["docstring_body"]
    assert (body.language, body.name.lower(), body.module) == (LANGUAGES[suffix], "area", path.name)
    assert body.prompt.startswith(f"Complete this {LANGUAGES[suffix]} function. Answer with its body.\n\n```")
    shown, answer = unfenced(body.prompt), unfenced(body.answer)
    whole = f"{shown}\n{answer}"
    flat = "\n".join(line.strip() for line in SOURCES[suffix].splitlines())
    assert "\n".join(line.strip() for line in whole.splitlines()) in flat
    assert shown.endswith("{")
    assert answer.endswith("\n}")
    assert "halves are never rounded" in answer
    gap = pairs["fill_middle"]
    assert unfenced(gap.prompt).replace("<missing lines>", unfenced(gap.answer)) == whole
    assert "radius" in gap.answer
    question = pairs["question_code"]
    asked = "Area gives the area of a circle,\nin square metres."
    assert question.prompt == f"Write the {LANGUAGES[suffix]} function `{body.name}`.\n\n{asked}"
    assert "square metres" not in question.answer


@pytest.mark.parametrize("suffix", ["js", "ts", "tsx"])
@pytest.mark.parametrize("is_exported", [True, False])
@pytest.mark.parametrize(
    "start", ["const area = async (circle, scale) => {", "let area = function (circle, scale) {"]
)
def test_a_function_that_a_name_is_bound_to_is_one_of_that_name(
    tmp_path: Path, suffix: str, is_exported: bool, start: str
) -> None:
    start = f"export {start}" if is_exported else start
    source = (
        f"// Area gives the area of a circle.\n{start}\n  const radius = circle.radius * scale;\n"
        "  return Math.PI * radius * radius;\n};\n"
    )
    (tmp_path / f"circle.{suffix}").write_text(source)
    pairs = by_kind(tmp_path)
    assert set(pairs) == {"docstring_body", "fill_middle", "question_code"}
    body = pairs["docstring_body"]
    assert body.name == "area"
    assert f"{unfenced(body.prompt)}\n{unfenced(body.answer)}" == source.rstrip()
    assert pairs["question_code"].prompt.endswith("Area gives the area of a circle.")


@pytest.mark.parametrize("suffix", ["js", "ts", "tsx"])
@pytest.mark.parametrize("start", ["area = (scale) => {", "static area = async function (scale) {"])
def test_a_function_that_a_field_of_a_class_holds_is_one_of_that_name(
    tmp_path: Path, suffix: str, start: str
) -> None:
    lines = [
        "/** Area gives the area of a circle. */",
        start,
        "  const radius = this.radius * scale;",
        "  return Math.PI * radius * radius;",
        "};",
    ]
    fields = "".join(f"  {line}\n" for line in lines)
    (tmp_path / f"circle.{suffix}").write_text(f"class Circle {{\n  sides = 1;\n{fields}}}\n")
    pairs = by_kind(tmp_path)
    assert set(pairs) == {"docstring_body", "fill_middle", "question_code"}
    body = pairs["docstring_body"]
    assert body.name == "area"
    assert f"{unfenced(body.prompt)}\n{unfenced(body.answer)}" == "\n".join(lines)


@pytest.mark.parametrize(
    "source",
    [
        "const twice = (x) => x.map((one) => one * 2).filter(Boolean).concat([1000, 2000, 3000]);",
        "const a = 1, area = (c) => {\n  const radius = c.radius * 2;\n  return radius * radius;\n};",
        "const area = wrapped((c) => {\n  const radius = c.radius * 2;\n  return radius * radius;\n});",
    ],
)
def test_what_only_contains_a_function_is_none(tmp_path: Path, source: str) -> None:
    (tmp_path / "a.js").write_text(source)
    with pytest.raises(InvalidDataError):
        build_code_pairs(tmp_path, ["signature_body"])


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.rs", 'fn area(scale: f64) -> f64 {\n    let radius = scale * 2.0;\n    todo!("{}", radius)\n}'),
        ("a.go", 'package a\n\nfunc Area(x int) int {\n\ty := x * 1000\n\tpanic("not implemented")\n}'),
        ("a.java", "class A {\n  int f() {\n    int a = 10000;\n    throw new UnsupportedOperationException("
                   ");"
                   "\n  }\n}"),
        ("a.js", 'function f(x) {\n  const y = x * 1000000;\n  throw new Error("Not implemented yet");\n}'),
        ("a.ts", "function f(x: number): number {\n  // TODO: everything that is left\n  return x;\n}"),
        ("a.go", "// Code generated by protoc. DO NOT EDIT.\npackage a\n\nfunc F() int {\n\tvalue := 123456\n"
                 "\tother := value\n\treturn value + other\n}"),
        ("a.min.js", "function f(x) {\n  const y = x * 1000000;\n  return y + y + y;\n}"),
        ("a.js", "function broken(x) {\n  const y = (x * 1000000;\n  return y + y + y;\n}"),
    ],
)  # fmt: skip
def test_placeholders_and_generated_code_are_left_out(tmp_path: Path, name: str, source: str) -> None:
    (tmp_path / name).write_text(source)
    with pytest.raises(InvalidDataError, match=r"to learn from"):
        build_code_pairs(tmp_path)
