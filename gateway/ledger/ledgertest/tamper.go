// SPDX-License-Identifier: Apache-2.0

// Package ledgertest changes a ledger behind its back, as an intruder with the
// file would, so that tests can see it found out.
package ledgertest

import (
	"database/sql"
	"path/filepath"
	"testing"

	_ "modernc.org/sqlite" // the driver named "sqlite"
)

// Tamper runs statements on the ledger in dir, with foreign keys off. The
// append-only triggers hold here too: drop them first.
func Tamper(t testing.TB, dir string, stmts ...string) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, "ledger.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	for _, s := range append([]string{"PRAGMA foreign_keys = OFF"}, stmts...) {
		if _, err := db.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}
