from __future__ import annotations

import pytest

from eapo_fast.errors import ConfigError
from eapo_fast.rewards import Verdict, readable, verify

EQUAL = [
    # integers, decimals, fractions: exact, no rounding
    ("42", "42"),
    ("042", "42"),
    ("5.0", "5"),
    ("+5", "5"),
    ("-0", "0"),
    (".35625", "0.35625"),
    ("1/2", "0.5"),
    (r"\frac{3}{4}", "3/4"),
    (r"\dfrac43", r"\tfrac{4}{3}"),
    (r"\frac 59", "5/9"),
    (r"\frac9{19}", "9/19"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{1}{-2}", "-0.5"),
    (r"1\frac{4}{5}", "9/5"),
    ("1 4/5", "1.8"),
    (r"-1\frac{4}{5}", "-1.8"),
    (r"137 \frac{1}{2}", "137.5"),
    ("\u00bd", "0.5"),
    ("3\u00bd", "7/2"),
    ("\u22125", "-5"),
    # separators, money, scientific, percent, scales
    ("58,500", "58500"),
    (r"10,\!080", "10080"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("14{,}916", "14916"),
    ("1 000 000", "1000000"),
    (r"\$32,\!348", "32348"),
    ("$18.90", "18.9"),
    (r"6.72 \times 10^{-5}", ".0000672"),
    ("6.72e-5", "0.0000672"),
    ("1E3", "1000"),
    (r"50\%", "0.5"),
    ("50%", "50"),
    ("28 percent", r"28\%"),
    ("1.5 million", "1500000"),
    # units and degrees
    (r"90^\circ", "90"),
    ("90\u00b0", r"90^{\circ}"),
    ("90 degrees", r"90^\circ"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"864 \mbox{ inches}^2", "864"),
    ("15 cm^2", r"15\mbox{ square centimeters}"),
    ("5cm", "5"),
    ("12 men", "12"),
    ("60 miles per hour", "60"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    # roots, constants, complex numbers
    (r"\sqrt{16}", "4"),
    (r"\sqrt{\frac{9}{4}}", "3/2"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"\sqrt{12}", r"2\sqrt3"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("sqrt(51)", r"\sqrt{51}"),
    ("\u221a51", r"\sqrt{51}"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    (r"18+2\pi", r"2(\pi+9)"),
    ("2*pi", r"2\pi"),
    ("288\u03c0", r"288 \pi"),
    (r"\sin(\frac{\pi}{6})", "1/2"),
    (r"\sin 30^\circ", "0.5"),
    (r"\log_2 8", "3"),
    (r"\ln(e^2)", "2"),
    (r"e^{\ln 3}", "3"),
    (r"|{-3}|", "3"),
    ("5!", "120"),
    ("2^{10}", "1024"),
    ("2**10", "2^10"),
    ("6 - 5i", "-5i+6"),
    ("(1+i)^2", "2i"),
    ("4^{3/2}", "8"),
    (r"\cos(2\pi/3)", "-1/2"),
    # expressions
    ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("x^2-1", "(x-1)(x+1)"),
    ("2k+2", "2(k+1)"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\frac{11+9a}{20}", "0.55+0.45a"),
    ("2xy", "2yx"),
    (r"\sqrt{2}x", r"\frac{2x}{\sqrt{2}}"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (r"\sin^2 x+\cos^2 x", "1"),
    ("2^{n+1}", r"2\cdot 2^n"),
    (r"x_1+x_2", "x_2+x_1"),
    # equations and inequalities
    ("x=5", "5"),
    ("y = 2x + 3", "2x+3"),
    ("f(x) = 2x", "2x"),
    ("5x - 7y + 11z + 4 = 0", "-10x+14y=22z+8"),
    ("x > 5", r"(5,\infty)"),
    ("5 < x", "x>5"),
    (r"-2 \le x \le 7", "[-2,7]"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"x<2 \text{ or } x>3", r"(-\infty,2)\cup(3,\infty)"),
    # collections
    ("(3, 4)", r"\left( 3, 4 \right)"),
    (r"\left(\frac{3}{5},\frac{8}{3}\right]", "(0.6, 8/3]"),
    ("1,-2", "-2, 1"),
    ("-2 and 1", "1,-2"),
    (r"1 \text{ or } 2", "2,1"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2,1-\sqrt5,1+\sqrt5\}"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("x=1 or x=2", "1,2"),
    (r"(2,12) \cup (12,102)", r"(12,102)\cup(2,12)"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{bmatrix}0.2\\-3.6\end{bmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)"),
    ("[1,2,3]", "(1,2,3)"),
    ("3:4", "6:8"),
    ("(1,234)", "(1, 234)"),
    ("100,200", "100, 200"),
    # texts
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
    ("(C)", r"\text{C}"),
    ("The ellipse", r"\text{ellipse}"),
    ("\\textbf{even}", "even"),
    # bases
    ("52_8", "52_{8}"),
    ("42", "52_8"),
    ("101_2", "5"),
    # repeating decimals, decimal commas
    (r"0.\overline{3}", "1/3"),
    (r"0.1\overline{6}", r"\frac16"),
    (r"0.\dot{9}", "1"),
    ("3,14", "3.14"),
    ("0,125", r"\frac18"),
    # roundings, counts, divisors
    (r"\lfloor 3.7 \rfloor", "3"),
    (r"\lceil \pi \rceil", "4"),
    (r"\binom{10}{3}", "120"),
    (r"\gcd(12, 18)", "6"),
    (r"\operatorname{lcm}(4, 6)", "12"),
    (r"\max(2, 3)", "3"),
    # what a side may be called
    ("AB = 5", "5"),
    (r"\overline{AB} = 5", "5"),
    (r"|AB| = 5", "5"),
    (r"\angle ABC = 30^\circ", "30"),
    (r"\frac{AB}{CD} = \frac12", "0.5"),
    (r"S_1 : S_2 = 2:3", "4:6"),
    ("0 < f(x) < 1", "(0, 1)"),
    ("AB=4, CD=5", "4, 5"),
    ("p=5,q=2; p=7,q=2", "(5,2),(7,2)"),
    ("(1,2),(3,4),(1,2)", "(3,4),(1,2)"),
    # choices
    (r"\textbf{(B)}\ 12", "12"),
    (r"\textbf{(B)}\ 12", "B"),
    ("B) 12", r"\text{B}"),
    (r"\text{A, C}", "C, A"),
    (r"\text{No solution}", r"\emptyset"),
    # slips of spelling
    (r"\\frac{1}{2}", r"\frac12"),
    (r"x_1=1,\quadx_2=2", "1, 2"),
    (r"\begin{pmatrix}1\\2\\\end{pmatrix}", "(1,2)"),
    (r"\frac{1}{\mathrm{e}}", "1/e"),
    # proofs: algebraic numbers, large numbers, whole variables
    (r"\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5}", "1"),
    (r"\sqrt2+\sqrt3+\sqrt5+\sqrt7", r"\sqrt7+\sqrt5+\sqrt3+\sqrt2"),
    (r"2^{100000}\cdot 2", "2^{100001}"),
    ("(x+1)^{2000}", "(x+1)^{1999}(x+1)"),
    (r"\cos(n\pi)", "(-1)^n"),
    (r"\sqrt{1/n}", r"\frac{1}{\sqrt n}"),
    (r"1, 2, \dots, n", r"1, 2, \ldots, n"),
    ("12 m/s", "12"),
    # raised, lowered and invisible characters
    ("2\u00b9\u2070", "1024"),
    ("10\u207b\u00b3", "0.001"),
    ("x\u207f", "x^n"),
    ("x\u2081+x\u2082", "x_1+x_2"),
    ("5\u200b", "5"),
    ("2\u2062x", "2x"),
    # marks around an answer
    ("*5*", "5"),
    ("__5__", "5"),
    ('"A"', "A"),
    ("USD 12.50", "12.5"),
    ("3 x 10^8", "300000000"),
    # repeating decimals in brackets, double factorials, conjugates, shifted factorials
    ("0.(3)", "1/3"),
    ("0.1(6)", "1/6"),
    ("5!!", "15"),
    (r"\overline{3+4i}", "3-4i"),
    ("(n+1)!", r"(n+1)\cdot n!"),
    (r"{5 \choose 2}", "10"),
    (r"\sum_{i=1}^{10} i", "55"),
    # bases above ten, and in words
    ("2A_{16}", "42"),
    ("FF_{16}", "255"),
    (r"12_{\text{eight}}", "10"),
    # sets of numbers, however they are written
    (r"\{1,1,2\}", r"\{1,2\}"),
    (r"[1,2]\cup[2,3]", "[1,3]"),
    (r"[\sqrt2,2]\cup[2,3]", r"[\sqrt2,3]"),
    (r"\mathbb{R}\setminus\{3\}", r"(-\infty,3)\cup(3,\infty)"),
    (r"x \ne 3", r"(-\infty,3)\cup(3,\infty)"),
    (r"x\ne 1, x \ne 2", r"(-\infty,1)\cup(1,2)\cup(2,\infty)"),
    ("x > 1 and x < 3", "1 < x < 3"),
    (r"\{x : x > 3\}", "x > 3"),
    (r"\{x \in \mathbb{R} \mid x > 3\}", r"(3, \infty)"),
    ("x > 1, y < 3", "y < 3, x > 1"),
    (r"\text{no real solutions}", r"\text{no solution}"),
    # names, units, angles, words for numbers
    ("f'(x) = 2x", "2x"),
    ("f(x, y) = x+y", "x+y"),
    ("u(t) = e^{-t}", "e^{-t}"),
    (r"\frac{dy}{dx} = 2x", "2x"),
    ("f^{-1}(x) = x-1", "x-1"),
    ("A(1,2)", "(1,2)"),
    ("9.8 m/s^2", "9.8"),
    ("5 m^2", r"5\text{ square meters}"),
    ("12:30 p.m.", "12:30 PM"),
    (r"\arcsin\frac12", r"30^\circ"),
    (r"45^\circ", r"\frac{\pi}{4}\text{ radians}"),
    (r"\text{five}", "5"),
    (r"\text{infinity}", r"\infty"),
    (r"\text{Option A}", "A"),
    ("[[1,2],[3,4]]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("1, 2, ..., n", r"1, 2, \ldots, n"),
    (r"\sqrt{2\pm 1}", r"\sqrt3, 1"),
    (r"\mathbb{R} - \{3\}", r"x \ne 3"),
    (r"\text{all real numbers}", r"\mathbb{R}"),
    # equations solved for another variable, indices of solutions
    ("2y = x", "y = x/2"),
    ("x_1 = 1, x_2 = 2", "x = 1, x = 2"),
    # marks behind mixed numbers
    (r"66\frac{2}{3}\%", r"\frac{2}{3}"),
    (r"22\frac12^\circ", "22.5"),
    ("66 2/3%", "2/3"),
    # style, space and displays
    (r"5\;\;", "5"),
    ("5\\\\", "5"),
    ("= 5", "5"),
    (r"\textcolor{red}{5}", "5"),
    (r"\underline{5}", "5"),
    (r"\begin{align*}x&=5\end{align*}", "5"),
    (r"\begin{cases}x=1\\y=2\end{cases}", "x=1, y=2"),
    (r"{1\over 2}", "0.5"),
    (r"0.\dot{1}2\dot{3}", "41/333"),
    (r"\max\{1,2,3\}", "3"),
    # what stands in texts
    ("10 min", r"10\text{ minutes}"),
    (r"\text{5 m}", "5"),
    (r"\text{(A) 5}", "5"),
    (r"\text{(A) }5", "A"),
    ("A: 5", "A"),
    (r"\text{(B), (C)}", "B, C"),
    (r"\text{July 4}", "July 4"),
    ("one half", r"\frac12"),
]

DIFFERENT = [
    ("41", "42"),
    ("0.333", "1/3"),
    ("3.14", r"\pi"),
    ("1.41421356237309504880168872420969807856967", r"\sqrt{2}"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    (r"\sqrt{1+10^{-300}}", "1"),
    (r"1-\frac{1}{e}", r"1+\frac{1}{e}"),
    ("12_5", "12_6"),
    ("-5", "5"),
    ("12", "1/2"),
    ("1,2", "1"),
    ("1", "1,2"),
    ("1,2,3", "1,2"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("(1,2)", "(2,1)"),
    ("(1,2]", "(1,2)"),
    ("[1,2]", "(1,2)"),
    (r"(-\infty,2)", r"(2,\infty)"),
    (r"\infty", r"-\infty"),
    ("5 cm", "5 m"),
    ("x=5", "6"),
    ("x+1", "x+2"),
    ("x^2", "x^3"),
    ("x", "X"),
    ("2x+3y=5", "2x+3y=6"),
    ("x>5", r"[5,\infty)"),
    ("3:4", "4:3"),
    (r"\text{east}", r"\text{west}"),
    ("A", "B"),
    ("(C)", "(D)"),
    ("", "5"),
    ("east", "5"),
    ("(1,2)", "3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    ("5^2", "10"),
    ("-2^2", "4"),
    (r"\frac{x}{2}", r"\frac{2}{x}"),
    ("50%", "5"),
    ("1:00", "12:00"),
    ("1,2", "1.2"),
    (r"0.\overline{3}", "0.3"),
    ("2^{100000}", "2^{100001}"),
    ("1+e^{-e^8}", "1"),
    (r"\cos(10^{-100})", "1"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
    ("x(2+2^{127}-39)", "2x"),
    (r"\frac{2^{2005}+1}{3\cdot 2^{2006}}", r"\frac{1}{3\cdot 2^{2006}}"),
    (r"\pm 21", "21"),
    ("n=2,3,4", "n=1,2,3"),
    ("D=(0,1)", "D=(0,2)"),
    (r"\textbf{(B)}\ 12", "13"),
    (r"4\sqrt(2)", "4"),
    (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"),
    ("0.(3)", "0"),
    ("5!!", "(5!)!"),
    ("2\u00b9\u2070", "2"),
    ("x\u2081", "x"),
    ("x\u207f", "xn"),
    (r"\overline{3+4i}", "3+4i"),
    (r"\overline{z}", "z"),
    ("2A_{16}", "2A_{15}"),
    ("2A_{16}", "2B_{16}"),
    (r"\{1,1,2\}", r"\{1,2,3\}"),
    (r"\{\{1\},2\}", r"\{1,\{2\}\}"),
    (r"[1,2)\cup(2,3]", "[1,3]"),
    (r"[\sqrt2,2)\cup(2,3]", r"[\sqrt2,3]"),
    (r"\mathbb{R}\setminus\{3\}", r"(-\infty,3)\cup(4,\infty)"),
    (r"x \ne 3", "3"),
    ("x > 1, y < 3", "y > 1, x < 3"),
    ("12:30 PM", "12:30 AM"),
    (r"30^\circ", r"\pi/3"),
    ("2023-01-01", "2021"),
    ("1,2,...", "1,2"),
    (r"\text{five}", "6"),
    ("2y = x", "y = 2x"),
    ("x_1 = 1, x_2 = 2", "x = 1, x = 3"),
    (r"66\frac{2}{3}\%", r"66+\frac{2}{300}"),
    (r"\textcolor{red}{5}", "red"),
    ("10 min", "10 hours"),
    (r"\text{(A) 5}", "6"),
    (r"\begin{cases}x=1\\y=2\end{cases}", "x=2, y=1"),
    ("one half", "1"),
    ("[[1,2],[3,4]]", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
]

UNDECIDED = [
    ("52", "52_8", "base"),
    (r"\sqrt{x^2}", "x", "positive"),
    ("2", r"\log 100", "base"),
    ("1/0", "5", "undefined"),
    ("60 minutes", "1 hour", "units"),
    ("12:30", "6:15", "a time or a ratio"),
    ("0.333...", "1/3", "unfinished"),
    ("5...", "5", "unfinished"),
    ("1+e^{-e^{10}}", "1", "computer algebra"),
    ("9^{9^{9^9}}", "5", "power"),
    (r"\infty-\infty", "0", "infinity"),
    ("5", "", "empty"),
    ("5", r"\foo{5}", "unreadable reference"),
]


@pytest.mark.parametrize(("prediction", "gold"), EQUAL)
def test_equal_answers_are_correct_in_both_orders(prediction: str, gold: str) -> None:
    for a, b in ((prediction, gold), (gold, prediction)):
        verdict = verify(a, b, extract="none")
        assert verdict.status == "correct", verdict


@pytest.mark.parametrize(("prediction", "gold"), DIFFERENT)
def test_different_answers_are_incorrect(prediction: str, gold: str) -> None:
    verdict = verify(prediction, gold, extract="none")
    assert verdict.status == "incorrect", verdict
    if prediction:
        assert verify(gold, prediction, extract="none").status == "incorrect"


@pytest.mark.parametrize(("prediction", "gold", "reason"), UNDECIDED)
def test_what_is_not_certain_is_undecided_with_a_reason(
    prediction: str, gold: str, reason: str
) -> None:
    verdict = verify(prediction, gold, extract="none")
    assert verdict.status == "undecided", verdict
    assert reason in verdict.reason


def test_a_verdict_shows_what_was_compared() -> None:
    verdict = verify(r"so \boxed{7} it is", r"$\boxed{8}$")
    assert verdict == Verdict(
        status="incorrect", reason="different values", prediction="7", gold="8"
    )
    assert not verdict.correct


def test_the_gold_itself_is_correct_even_when_it_cannot_be_read() -> None:
    assert verify(r"$\foo{1} \bar$", r" $\foo{1} \bar$").correct
    assert not verify(" ", " ").correct


def test_as_many_boxes_on_the_last_line_as_the_gold_has_answers() -> None:
    text = r"for (a) we get \boxed{(3,3)}, and for (b) we get \boxed{(1,1)}"
    assert verify(text, "(3,3), (1,1)").correct
    assert not verify(text, "(3,3), (2,1)").correct
    assert not verify(r"\boxed{4} \boxed{5} \boxed{6}", "5").correct
    assert not verify("\\boxed{1}\nNo: \\boxed{2}", "1, 2").correct


def test_gold_may_be_a_solution() -> None:
    assert verify("18", "She sells 9 * 2 = 18.\n#### 18").correct
    assert verify("18", r"Hence $x=\boxed{18}$ dollars.").correct
    assert verify("18", "$18$").correct


def test_an_unknown_extraction_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'boxed'"):
        verify("5", "5", extract="boxd")


def test_readable_says_why_not() -> None:
    assert readable(r"\frac{1}{2}") is None
    assert "unknown command" in str(readable(r"\foo"))
    assert "empty" in str(readable(" "))
    assert readable(r"\textbf{(B)}\ 12") is None
