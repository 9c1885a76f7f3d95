"""The codec over a small family of dataclasses that has one of everything a config may hold."""

import dataclasses
import gc
import json
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import codec
from lm.errors import UserError
from lm.optim import AdamW, Cosine, Optimizer


@dataclass(frozen=True, kw_only=True)
class Shape:
    color: str = "red"
    width: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Circle(Shape):
    radius: float


@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    """Has a default of its own for `color`, and no `radius`."""

    color: str = "blue"
    side: int = 2

    def __post_init__(self):
        if self.side < 1:
            raise UserError(f"square.side: expected at least 1, got {self.side}")


@dataclass(frozen=True, kw_only=True)
class Disc(Shape):
    """Needs what Circle needs."""

    radius: float
    hole: bool = False


@dataclass(frozen=True, kw_only=True)
class Bounds:
    low: int = 0
    high: int = 10

    def __post_init__(self):
        if self.low > self.high:
            raise UserError(f"bounds.low: {self.low} is above bounds.high {self.high}")


@dataclass(frozen=True, kw_only=True)
class Tree:
    n: int = 3
    rate: float = 0.5
    on: bool = False
    name: str = "oak"
    mode: Literal["fast", "slow", 2] = "fast"
    pair: tuple[int, float] = (1, 2.0)
    names: tuple[str, ...] = ()
    maybe: float | None = None
    weights: dict[str, float] | None = None
    shape: Shape = Square()
    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)
    spare: Shape | None = None
    bounds: Bounds | str = Bounds()


@dataclass(frozen=True, kw_only=True)
class Open:
    """What classes elsewhere are of."""


PATH = f"{__name__}."
TREE = Tree(shapes={"a": Circle(radius=1.5), "b": Square(side=7)}, weights={"x": 0.25}, spare=Circle(radius=3.0))

finite = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**40), 2**40)
shapes = st.one_of(
    st.builds(Circle, color=st.text(), width=finite, radius=finite),
    st.builds(Square, color=st.text(), width=finite, side=st.integers(1, 99)),
    st.builds(Disc, color=st.text(), width=finite, radius=finite, hole=st.booleans()),
)
trees = st.builds(
    Tree,
    n=integers,
    rate=finite,
    on=st.booleans(),
    name=st.text(),
    mode=st.sampled_from(["fast", "slow", 2]),
    pair=st.tuples(integers, finite),
    names=st.lists(st.text(), max_size=3).map(tuple),
    maybe=st.none() | finite,
    weights=st.none() | st.dictionaries(st.text(), finite, max_size=3),
    shape=shapes,
    shapes=st.dictionaries(st.text(), shapes, max_size=3),
    spare=st.none() | shapes,
    bounds=st.text() | st.builds(Bounds, low=st.integers(-9, 0), high=st.integers(0, 9)),
)


# --- JSON both ways ---------------------------------------------------------------------------------------------------


def test_encode_writes_the_class_of_every_dataclass_and_plain_json_otherwise():
    assert codec.encode(Tree(shape=Circle(radius=1.5), weights={"x": 2.0})) == {
        "_type": PATH + "Tree",
        "n": 3,
        "rate": 0.5,
        "on": False,
        "name": "oak",
        "mode": "fast",
        "pair": [1, 2.0],
        "names": [],
        "maybe": None,
        "weights": {"x": 2.0},
        "shape": {"_type": PATH + "Circle", "color": "red", "width": 1.0, "radius": 1.5},
        "shapes": {},
        "spare": None,
        "bounds": {"_type": PATH + "Bounds", "low": 0, "high": 10},
    }


def test_a_class_of_ours_is_stored_without_its_module_and_may_move():
    assert codec.encode(AdamW(lr=0.5))["_type"] == "AdamW"
    for name in ("AdamW", "lm.optim.optimizers.AdamW", "lm.some.module.that.was.AdamW"):
        assert codec.decode(Optimizer, {"_type": name, "lr": 0.5}) == AdamW(lr=0.5)
        assert codec.flatten({"optim": {"_type": name}, "all": [{"_type": name}]}) == {
            "optim._type": "AdamW",
            "all": [{"_type": "AdamW"}],
        }
    with pytest.raises(UserError, match=r"^optim: no Optimizer is called 'AdmW'; did you mean 'AdamW'\?$"):
        codec.decode(Optimizer, {"_type": "lm.optim.optimizers.AdmW", "lr": 0.5}, "optim")


def test_a_class_of_ours_with_subclasses_of_others_is_found_by_its_name():
    class Mine(Cosine):
        pass

    assert codec.decode(Cosine, codec.encode(Cosine(warmup_steps=3))) == Cosine(warmup_steps=3)
    del Mine
    gc.collect()  # no class that other tests see


def test_a_class_of_others_is_stored_with_its_module_which_is_imported(tmp_path, monkeypatch):
    (tmp_path / "elsewhere_of_test_codec.py").write_text(
        f"from dataclasses import dataclass\nfrom {__name__} import Open\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Far(Open):\n    more: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tree = {"_type": "elsewhere_of_test_codec.Far", "more": 2}
    found = codec.decode(Open, tree)
    assert (type(found).__name__, codec.encode(found)) == ("Far", tree)


@given(trees)
@settings(deadline=None)
def test_a_config_survives_json(tree):
    again = codec.decode(Tree, json.loads(json.dumps(codec.encode(tree))))
    assert repr(again) == repr(tree)  # repr tells 1 from 1.0 and a list from a tuple


def test_what_json_leaves_out_is_the_default():
    assert codec.decode(Tree, {"n": 5, "shape": {"_type": "Circle", "radius": 2}}) == Tree(
        n=5, shape=Circle(radius=2.0)
    )


def test_an_int_is_a_float_and_nothing_else_is_coerced():
    rate = codec.decode(Tree, {"rate": 1}).rate
    assert (rate, type(rate)) == (1.0, float)
    for field, value in [("n", 1.0), ("n", True), ("rate", True), ("rate", "1"), ("on", 1), ("name", 1), ("mode", 2.0)]:
        with pytest.raises(UserError, match=f"^{field}: expected "):
            codec.decode(Tree, {field: value})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (7, "Tree: expected Tree, got 7; one of Tree(...)"),
        ({"rat": 1.0}, "rat: Tree has no field 'rat'; did you mean 'rate'?"),
        ({"shape": {"_type": "Circle"}}, "shape: Circle needs radius; write Circle(radius=...)"),
        ({"shape": 3}, "shape: expected Shape, got 3; one of Circle(...), Disc(...), Square(...)"),
        ({"shape": {"_type": "Sqare"}}, "shape: no Shape is called 'Sqare'; did you mean 'Square'?"),
        (
            {"shape": {"_type": 5}},
            "shape: expected the name of a class or Name(field=value), got 5; one of Circle, Disc, Square",
        ),
        (
            {"shape": {"_type": "no_such_package.Circle"}},
            "shape: cannot find the class 'no_such_package.Circle': No module named 'no_such_package'; "
            "is its package installed?",
        ),
        (
            {"shape": {"_type": PATH + "Bounds"}},
            f"shape: expected Shape, got the class '{PATH}Bounds'; one of Circle, Disc, Square",
        ),
        ({"shape": {3: 1}}, "shape.3: Shape has no field 3; known: color, width"),
        ({"shapes": {"a": {"_type": "Circle", "radius": "x"}}}, "shapes.a.radius: expected float, got 'x'"),
        (
            {"shapes": {"a": {"_type": "Square", "syde": 1}}},
            "shapes.a.syde: Square has no field 'syde'; did you mean 'side'?",
        ),
        ({"shapes": []}, "shapes: expected a dict, got []"),
        ({"pair": [1]}, "pair: expected 2 values, got 1: [1]"),
        ({"pair": [1, "x"]}, "pair[1]: expected float, got 'x'"),
        ({"pair": 1}, "pair: expected a list, got 1"),
        ({"names": ["a", 2]}, "names[1]: expected str, got 2; for text write names[1]='\"2\"'"),
        ({"mode": "fst"}, "mode: expected one of 'fast', 'slow', 2, got 'fst'"),
        ({"maybe": "x"}, "maybe: expected float, got 'x'"),
        ({"weights": {"x": "y"}}, "weights.x: expected float, got 'y'"),
        ({"bounds": 3}, "bounds: expected Bounds or str, got 3"),
        ({"bounds": {"lo": 3}}, "bounds.lo: Bounds has no field 'lo'; did you mean 'low'?"),
        ({"rate": float("nan")}, "rate: expected a finite number, got nan"),
        ({"rate": float("inf")}, "rate: expected a finite number, got inf"),
        ({"rate": 10**400}, "rate: expected a finite number, got inf"),
        ({"n": 1e3}, "n: expected int, got 1000.0; write 1000"),
        ({"on": "yes"}, "on: expected bool, got 'yes'; write true or false"),
    ],
)
def test_a_wrong_tree_is_one_line_with_path_got_and_way_out(tree, message):
    with pytest.raises(UserError) as e:
        codec.decode(Tree, tree)
    assert str(e.value) == message


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("n=5", {"n": 5}),
        ("n=-5", {"n": -5}),
        ("n=1_000", {"n": 1000}),
        ("rate=1e-3", {"rate": 0.001}),
        ("rate=2", {"rate": 2.0}),
        ("on=true", {"on": True}),
        ("on=True", {"on": True}),
        ("on=FALSE", {"on": False}),
        ("name=elm", {"name": "elm"}),
        ("name=gs://bucket/a=b", {"name": "gs://bucket/a=b"}),
        ("name=", {"name": ""}),
        ("name='none'", {"name": "none"}),
        ("name='12'", {"name": "12"}),
        ("mode=slow", {"mode": "slow"}),
        ("mode=2", {"mode": 2}),
        ("pair=(4, 5)", {"pair": (4, 5.0)}),
        ("pair=4,5", {"pair": (4, 5.0)}),
        ("names=[p,q]", {"names": ("p", "q")}),
        ("maybe=0.25", {"maybe": 0.25}),
        ("maybe=none", {"maybe": None}),
        ("weights=null", {"weights": None}),
        ("weights={y: 1}", {"weights": {"y": 1.0}}),
        ("weights.x=2", {"weights": {"x": 2.0}}),
        ("weights.y=2", {"weights": {"x": 0.25, "y": 2.0}}),
        ("shapes.b.side=11", {"shapes": {"a": Circle(radius=1.5), "b": Square(side=11)}}),
        ("shapes.c=Square()", {"shapes": {"a": Circle(radius=1.5), "b": Square(side=7), "c": Square()}}),
        ("shape.color=green", {"shape": Square(color="green")}),
        ("shape=Circle(radius=2, color=green)", {"shape": Circle(radius=2.0, color="green")}),
        ("shape=Disc(radius=2, hole=true)", {"shape": Disc(radius=2.0, hole=True)}),
        (f"shape={PATH}Circle(radius=2)", {"shape": Circle(radius=2.0)}),
        ("spare.radius=4", {"spare": Circle(radius=4.0)}),
        ("spare=none", {"spare": None}),
        ("bounds=anywhere", {"bounds": "anywhere"}),
        ("bounds=Bounds(high=5)", {"bounds": Bounds(high=5)}),
    ],
)
def test_override_replaces_one_field_and_leaves_the_rest(assignment, expected):
    assert repr(codec.override(TREE, assignment)) == repr(dataclasses.replace(TREE, **expected))


def test_a_bare_class_name_keeps_what_was_set_in_the_fields_both_share():
    tree = Tree(shape=Circle(radius=5.0, width=0.5))
    assert codec.override(tree, "shape=Disc").shape == Disc(radius=5.0, width=0.5)
    assert codec.override(tree, "shape=Square").shape == Square(width=0.5)


def test_a_bare_class_name_does_not_turn_an_old_default_into_a_setting():
    assert codec.override(Tree(shape=Circle(radius=5.0)), "shape=Square").shape.color == "blue"


def test_a_class_in_a_dict_can_be_exchanged_by_name():
    assert codec.override(TREE, "shapes.a=Disc").shapes["a"] == Disc(radius=1.5)


def test_a_class_call_starts_from_the_defaults():
    tree = Tree(shape=Circle(radius=5.0, width=0.5))
    assert codec.override(tree, "shape=Circle(radius=1)").shape == Circle(radius=1.0)


def test_later_overrides_see_earlier_ones():
    tree = codec.override(TREE, "shape=Circle(radius=1)", "shape.radius=2", "shapes.c=Square()", "shapes.c.side=9")
    assert tree.shape == Circle(radius=2.0)
    assert tree.shapes["c"] == Square(side=9)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_overrides_that_only_fit_together_may_come_in_any_order(order):
    assignments = ["bounds.low=20", "bounds.high=30"]
    tree = codec.override(TREE, *(assignments[i] for i in order))
    assert tree.bounds == Bounds(low=20, high=30)
    with pytest.raises(UserError, match=r"^bounds.low: 20 is above bounds.high 10$"):
        codec.override(TREE, "bounds.low=20")


def test_the_original_is_not_touched():
    before = repr(TREE)
    codec.override(TREE, "shapes.b.side=11", "weights.x=3", "n=9")
    assert repr(TREE) == before


def test_what_the_config_held_before_is_checked_too():
    with pytest.raises(UserError, match=r"^mode: expected one of 'fast', 'slow', 2, got 'quick'$"):
        codec.override(Tree(mode="quick"), "n=1")
    with pytest.raises(UserError, match=r"^shape.side: expected int, got 2.5$"):
        codec.override(Tree(shape=Square(side=2.5)))


def test_the_call_to_write_has_all_fields_that_are_needed():
    @dataclass(frozen=True, kw_only=True)
    class Span:
        start: int
        stop: int

    with pytest.raises(UserError) as e:
        codec.decode(Span, {"stop": 3})
    assert str(e.value) == "Span: Span needs start; write Span(start=..., stop=...)"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("n", "'n': expected path=value, for example optim.lr=1e-3"),
        ("=3", "'=3': expected path=value, for example optim.lr=1e-3"),
        ("shape..color=3", "'shape..color=3': expected path=value, for example optim.lr=1e-3"),
        ("rat=1", "rat: Tree has no field 'rat'; did you mean 'rate'?"),
        ("shape.syde=1", "shape.syde: Square has no field 'syde'; did you mean 'side'?"),
        ("shape.radius.x=1", "shape.radius: Square has no field 'radius'; known: color, side, width"),
        ("shapes.aa.color=x", "shapes.aa: no entry 'aa'; did you mean 'a'?"),
        ("shapes.b.syde=1", "shapes.b.syde: Square has no field 'syde'; did you mean 'side'?"),
        ("n.x=1", "n.x: n is 3, which has no fields; set n itself"),
        ("pair.0=1", "pair.0: pair is (1, 2.0), which has no fields; set pair itself"),
        ("maybe.x=1", "maybe.x: maybe is None, which has no fields; set maybe itself"),
        ("shape.color.x.y=1", "shape.color.x: shape.color is 'blue', which has no fields; set shape.color itself"),
        ("n=1.5", "n: expected int, got 1.5"),
        ("n=many", "n: expected int, got 'many'"),
        ("n=08", "n: expected int, got '08'"),
        ("n=true", "n: expected int, got True"),
        ("rate=nan", "rate: expected float, got 'nan'"),
        ("rate=1e999", "rate: expected a finite number, got inf"),
        ("name=12", "name: expected str, got 12; for text write name='\"12\"'"),
        ("shape=Sqare", "shape: no Shape is called 'Sqare'; did you mean 'Square'?"),
        ("shape=Circle", "shape: Circle needs radius; write Circle(radius=...)"),
        ("shape=Square(side=0)", "square.side: expected at least 1, got 0"),
        ("shape.side=0", "square.side: expected at least 1, got 0"),
        ("shape=Square(syde=1)", "shape.syde: Square has no field 'syde'; did you mean 'side'?"),
        (
            "shape=Square(1)",
            "shape: expected the name of a class or Name(field=value), got 'Square(1)'; one of Circle, Disc, Square",
        ),
        ("shape={3: 4}", "shape.3: Shape has no field 3; known: color, width"),
        (
            "shape={[3]: 4}",
            "shape: expected the name of a class or Name(field=value), got '{[3]: 4}'; one of Circle, Disc, Square",
        ),
        ("shapes.c=Circle", "shapes.c: Circle needs radius; write Circle(radius=...)"),
        ("shapes.c=3", "shapes.c: expected Shape, got 3; one of Circle(...), Disc(...), Square(...)"),
        ("weights.y=heavy", "weights.y: expected float, got 'heavy'"),
    ],
)
def test_a_wrong_override_is_one_line_with_path_got_and_way_out(assignment, message):
    with pytest.raises(UserError) as e:
        codec.override(TREE, assignment)
    assert str(e.value) == message


leaf_paths = st.sampled_from(
    ["n", "rate", "on", "name", "mode", "pair", "names", "maybe", "weights", "weights.x", "shape", "shape.side"]
    + ["shapes", "shapes.a", "shapes.b.side", "spare", "spare.radius", "bounds", "bounds.low"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | finite | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(leaf_paths, st.text() | json_values.map(repr))
@settings(deadline=None, max_examples=300)
def test_any_text_gives_a_config_or_one_line_that_starts_with_the_path(path, text):
    try:
        tree = codec.override(TREE, f"{path}={text}")
    except UserError as e:
        assert str(e).startswith((path, "square.side", "bounds.low"))
        assert "\n" not in str(e)
    else:
        assert codec.decode(Tree, codec.encode(tree)) == tree


@given(json_values)
@settings(deadline=None)
def test_a_python_literal_on_the_command_line_is_its_value(value):
    assert codec.parse(repr(value)) == value


@pytest.mark.parametrize(
    ("assignment", "paths"),
    [
        ("n=5", {"n"}),
        ("shape=Circle", {"shape"}),
        ("shape=Circle(radius=2)", {"shape._type", "shape.radius"}),
        ("shapes={a: Square(), b: Circle(radius=1)}", {"shapes.a._type", "shapes.b._type", "shapes.b.radius"}),
        ("pair=[1,2]", {"pair"}),
    ],
)
def test_assigned_names_the_leaves_that_an_assignment_writes(assignment, paths):
    assert codec.assigned(assignment) == paths


def test_flatten_gives_the_leaves_by_dotted_path():
    tree = {"a": 1, "b": {"c": [1, 2], "d": {}}, "e": {"f": {"g": None}}}
    assert codec.flatten(tree) == {"a": 1, "b.c": [1, 2], "b.d": {}, "e.f.g": None}
