// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// applicationID marks the file as a ledger: "bhlg".
const applicationID = 0x62686c67

// migrations bring user_version from i to i+1. A released one is never edited.
var migrations = []string{
	`
CREATE TABLE nodes (
  id           INTEGER PRIMARY KEY,
  node_id      TEXT    NOT NULL UNIQUE,
  watermark    INTEGER NOT NULL,
  head         BLOB    NOT NULL,
  last_push_ns INTEGER NOT NULL
) STRICT;

CREATE TABLE sources (
  id     INTEGER PRIMARY KEY,
  source TEXT    NOT NULL UNIQUE
) STRICT;

CREATE TABLE tenants (
  id   INTEGER PRIMARY KEY,
  path TEXT    NOT NULL UNIQUE
) STRICT;

CREATE TABLE records (
  seq          INTEGER PRIMARY KEY,
  node         INTEGER NOT NULL REFERENCES nodes(id),
  node_seq     INTEGER NOT NULL,
  id           TEXT    NOT NULL,
  source       INTEGER NOT NULL REFERENCES sources(id),
  prev_hash    BLOB    NOT NULL,
  hash         BLOB    NOT NULL,
  tenant       INTEGER NOT NULL REFERENCES tenants(id),
  sandbox      TEXT    NOT NULL,
  sandbox_name TEXT    NOT NULL,
  workload_ref TEXT    NOT NULL,
  policy_rev   INTEGER NOT NULL,
  meter        TEXT    NOT NULL,
  start_ns     INTEGER NOT NULL,
  end_ns       INTEGER NOT NULL,
  mono_ns      INTEGER NOT NULL,
  delta        INTEGER NOT NULL,
  cumulative   INTEGER NOT NULL,
  gpu_uuid     TEXT,
  mig_uuid     TEXT,
  profile      TEXT,
  fraction_num INTEGER,
  fraction_den INTEGER,
  quality      INTEGER NOT NULL,
  corrects     TEXT,
  ingested_ns  INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX records_node ON records(node, node_seq);
CREATE UNIQUE INDEX records_id ON records(id, source);
CREATE INDEX records_tenant ON records(tenant, start_ns);
CREATE INDEX records_corrects ON records(corrects) WHERE corrects IS NOT NULL;

CREATE TABLE conflicts (
  seq       INTEGER PRIMARY KEY,
  first_ns  INTEGER NOT NULL,
  last_ns   INTEGER NOT NULL,
  count     INTEGER NOT NULL,
  node_id   TEXT    NOT NULL,
  kind      TEXT    NOT NULL,
  node_seq  INTEGER NOT NULL,
  source    TEXT    NOT NULL,
  record_id TEXT    NOT NULL,
  have_hash BLOB,
  got_hash  BLOB    NOT NULL,
  record    BLOB    NOT NULL,
  UNIQUE (node_id, node_seq, kind, got_hash)
) STRICT;

CREATE TRIGGER records_no_update BEFORE UPDATE ON records
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: records are never changed'); END;
CREATE TRIGGER records_no_delete BEFORE DELETE ON records
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: records are never deleted'); END;
CREATE TRIGGER conflicts_no_delete BEFORE DELETE ON conflicts
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: conflicts are never deleted'); END;
CREATE TRIGGER nodes_no_delete BEFORE DELETE ON nodes
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: nodes are never deleted'); END;
CREATE TRIGGER sources_frozen BEFORE UPDATE ON sources
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: sources are never changed'); END;
CREATE TRIGGER sources_no_delete BEFORE DELETE ON sources
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: sources are never deleted'); END;
CREATE TRIGGER tenants_frozen BEFORE UPDATE ON tenants
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: tenants are never changed'); END;
CREATE TRIGGER tenants_no_delete BEFORE DELETE ON tenants
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: tenants are never deleted'); END;
CREATE TRIGGER nodes_forward BEFORE UPDATE ON nodes
WHEN NEW.watermark < OLD.watermark OR NEW.node_id <> OLD.node_id OR NEW.id <> OLD.id
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: a watermark never moves back'); END;
`,
}

// migrate brings the database to the newest schema, one transaction a step. It
// refuses a file that is not a ledger and one of a newer gateway.
func migrate(ctx context.Context, conn *sql.Conn) error {
	version, err := schemaVersion(ctx, conn)
	if err != nil {
		return err
	}
	for v := version; v < len(migrations); v++ {
		step := fmt.Sprintf("BEGIN IMMEDIATE;%s;PRAGMA user_version=%d;PRAGMA application_id=%d;COMMIT",
			migrations[v], v+1, applicationID)
		if _, err := conn.ExecContext(ctx, step); err != nil {
			_, rerr := conn.ExecContext(ctx, "ROLLBACK")
			return errors.Join(fmt.Errorf("migrate to schema %d: %w", v+1, err), rerr)
		}
	}
	return nil
}

// schemaVersion answers 0 for an empty database.
func schemaVersion(ctx context.Context, q querier) (int, error) {
	var version, app, tables int
	err := q.QueryRowContext(ctx, `SELECT (SELECT user_version FROM pragma_user_version),
	  (SELECT application_id FROM pragma_application_id), (SELECT count(*) FROM sqlite_master)`).
		Scan(&version, &app, &tables)
	switch {
	case err != nil:
		return 0, fmt.Errorf("read schema version: %w", err)
	case tables == 0 && version == 0:
		return 0, nil
	case app != applicationID:
		return 0, fmt.Errorf("%w: application_id is %#x, a ledger has %#x", ErrNotLedger, app, applicationID)
	case version > len(migrations):
		return 0, fmt.Errorf("%w: schema %d, this gateway knows up to %d", ErrNewerSchema, version, len(migrations))
	}
	return version, nil
}

// querier is what reading needs of a connection or a pool.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}
