"""Axis sizes worked out by hand, and the mesh over the 8 virtual devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.errors import UserError
from lm.mesh import AXES, Mesh, make_mesh


@pytest.mark.parametrize(
    ("mesh", "n_devices", "sizes"),  # data, fsdp, expert, seq, tensor
    [
        (Mesh(), 1, (1, 1, 1, 1, 1)),
        (Mesh(), 7, (1, 7, 1, 1, 1)),
        (Mesh(tensor=3), 12, (1, 4, 1, 1, 3)),
        (Mesh(data=-1, fsdp=2), 10, (5, 2, 1, 1, 1)),
        (Mesh(fsdp=2, seq=-1), 2, (1, 2, 1, 1, 1)),
        (Mesh(data=2, fsdp=3, expert=5, seq=7, tensor=11), 2310, (2, 3, 5, 7, 11)),
    ],
)
def test_the_free_axis_takes_the_devices_that_are_left(mesh, n_devices, sizes):
    assert mesh.sizes(n_devices) == dict(zip(("data", "fsdp", "expert", "seq", "tensor"), sizes, strict=True))


def test_n_devices_is_what_the_axes_ask_for_where_none_is_free():
    assert (Mesh(fsdp=3, tensor=5).n_devices, Mesh(fsdp=3, tensor=5).min_devices) == (15, 15)
    assert (Mesh(data=3, tensor=5).n_devices, Mesh(data=3, tensor=5).min_devices) == (None, 15)
    assert (Mesh().n_devices, Mesh().min_devices) == (None, 1)


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tensor=3), Mesh(data=2, fsdp=5), Mesh(seq=-1, fsdp=4)])
def test_the_mesh_fits_its_min_devices(mesh):
    assert np.prod(list(mesh.sizes(mesh.min_devices).values())) == mesh.min_devices


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 0}, "mesh.tensor: expected a positive number of devices or -1, got 0"),
        ({"data": -2}, "mesh.data: expected a positive number of devices or -1, got -2"),
        (
            {"data": -1, "seq": -1, "fsdp": 2},
            "mesh: only one axis may be -1, got data=-1 x seq=-1; set the others to a number",
        ),
    ],
)
def test_an_impossible_mesh_is_refused_when_it_is_written(sizes, message):
    with pytest.raises(UserError) as e:
        Mesh(**sizes)
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("mesh", "n_devices", "message"),
    [
        (Mesh(fsdp=3), 8, "mesh: fsdp=3 does not fit 8 devices; set one axis to -1, or other sizes"),
        (Mesh(fsdp=4), 8, "mesh: fsdp=4 does not fit 8 devices; set one axis to -1, or other sizes"),
        (Mesh(fsdp=16), 8, "mesh: fsdp=16 does not fit 8 devices; set one axis to -1, or other sizes"),
        (Mesh(fsdp=1), 8, "mesh: one device does not fit 8 devices; set one axis to -1, or other sizes"),
        (
            Mesh(tensor=3),
            8,
            "mesh: fsdp=-1 x tensor=3 does not fit 8 devices; use a multiple of 3 devices, or other sizes",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_says_what_would(mesh, n_devices, message):
    with pytest.raises(UserError) as e:
        mesh.sizes(n_devices)
    assert str(e.value) == message


def test_make_mesh_takes_all_devices_in_their_order_so_that_rows_stay_local():
    mesh = make_mesh(Mesh(data=2, fsdp=-1, tensor=2))
    assert mesh.axis_names == AXES == ("data", "fsdp", "expert", "seq", "tensor")
    assert mesh.devices.shape == (2, 2, 1, 1, 2)
    assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()]
    assert len(jax.devices()) == 8


def test_tensor_neighbours_are_next_to_each_other():
    mesh = make_mesh(Mesh(data=2, tensor=4, fsdp=1))
    assert [d.id for d in mesh.devices[1, 0, 0, 0]] == [d.id for d in jax.devices()[4:]]


def test_axes_are_auto_so_that_the_compiler_places_what_no_one_pinned():
    assert make_mesh(Mesh()).axis_types == (AxisType.Auto,) * 5  # jax.make_mesh would say Explicit


def test_make_mesh_takes_the_devices_it_is_given():
    mesh = make_mesh(Mesh(tensor=3), jax.devices()[2:8])
    assert (mesh.shape["fsdp"], mesh.shape["tensor"]) == (2, 3)
    assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()[2:8]]
    with pytest.raises(UserError, match="does not fit 7 devices"):
        make_mesh(Mesh(tensor=3), jax.devices()[1:])
