"""Rentals, and the name an installation signs them with."""

import sqlalchemy as sa
from alembic import op

from gpuproxy.store.schema import UtcTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "installations",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_installations"),
        sa.CheckConstraint("id = 1", name=op.f("ck_installations_there_is_one")),
    )
    op.create_table(
        "rentals",
        *_texts("id", "user_id", "provider", "offer_id", "native_id", "state", "reason", "label", "gpu_model"),
        *_texts("instance_id", "region", "ip", "basis", "hold_id", "request_hash", "group_id"),
        sa.Column("has_failed", sa.Boolean, nullable=False),
        sa.Column("gpu_count", sa.Integer, nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("ports", sa.JSON, nullable=False),
        sa.Column("committed_hours", sa.Integer, nullable=False),
        *_numbers("price_nanousd_per_hour", "storage_price_nanousd_per_hour"),
        *_numbers("cost_nanousd_per_hour", "storage_cost_nanousd_per_hour"),
        *_numbers("rate_nanousd_per_hour", "cost_rate_nanousd_per_hour", "running_us", "stopped_us"),
        *_numbers("accrued_nanousd", "accrued_rest", "cost_accrued_nanousd", "cost_accrued_rest"),
        *_numbers("charged_nanousd", "written_off_nanousd", "cost_posted_nanousd"),
        sa.Column("warned_s", sa.Integer, nullable=False),
        sa.Column("missing_count", sa.Integer, nullable=False),
        sa.Column("request_key", sa.Text),
        *(sa.Column(name, UtcTime, nullable=False) for name in ("metered_at", "created_at", "moved_at")),
        *(sa.Column(name, UtcTime) for name in ("seen_at", "running_at", "ended_at", "expires_at")),
        sa.PrimaryKeyConstraint("id", name="pk_rentals"),
        sa.UniqueConstraint("request_key", name="uq_rentals_request_key"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_rentals_user_id"),
        sa.ForeignKeyConstraint(["hold_id"], ["holds.id"], name="fk_rentals_hold_id"),
    )
    op.create_index("ix_rentals_user_id_created_at", "rentals", ["user_id", "created_at"])
    op.create_index("ix_rentals_state", "rentals", ["state"])
    op.create_index("ix_rentals_provider_native_id", "rentals", ["provider", "native_id"])
    op.create_index("ix_rentals_group_id", "rentals", ["group_id"])


def _texts(*names: str) -> "list[sa.Column[str]]":
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def _numbers(*names: str) -> "list[sa.Column[int]]":
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]
