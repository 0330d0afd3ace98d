// SPDX-License-Identifier: Apache-2.0

// Package ledger is the gateway's append-only store of accepted usage records.
//
// # Promises
//
// A record is in the ledger once Append returns nil, and stays: one SQLite
// transaction holds the records of a batch, the node's watermark and the head
// of its hash chain, and is on the disk (WAL, synchronous=FULL) before Append
// answers. After a crash a batch is either whole or absent. A batch that the
// ledger has already is accepted again and changes nothing.
//
// A node's records are contiguous from 1 to its watermark. A batch that begins
// later is refused with [*GapError]. A record whose number or id is known with
// another content, or that does not continue the node's hash chain, is refused
// with [*ConflictError]; nothing of its batch is kept, but the conflict is, with
// the refused record, for audit.
//
// A full disk is [ErrFull]: nothing was kept, and Append may be called again.
// After any other error of the database the ledger takes nothing more, because
// what the disk holds is no longer certain; Failed is closed and the process is
// expected to end and to open the ledger anew.
//
// The ledger never changes or deletes a record, never trusts a node's clock for
// anything but the interval that it states, and never sends anything.
//
// # Numbers
//
// SQLite has signed 64-bit integers. Unsigned quantities (delta, cumulative,
// policy_rev) are stored with the same 64 bits, so those of 2^63 and more look
// negative to other tools; refusing them would stop the node's chain for ever.
// Sums are exact: the two halves of each quantity are summed apart, SQLite
// raises an error if such a sum does not fit, and Go joins them in a [big.Int].
//
// # Corrections
//
// A record whose corrects is set replaces the record of the same node with that
// id, which must be in the ledger by then. A replaced record counts in no sum; it
// is still listed. Several records may replace one, as when a part belongs to
// another tenant.
//
// # Files
//
//	<dir>/lock             flock of the gateway that owns the directory
//	<dir>/ledger.db        application_id "bhlg", user_version 1
//	<dir>/ledger.db-wal    committed, not yet in ledger.db
//	<dir>/ledger.db-shm    index of the WAL, rebuilt after a crash
//
//	nodes                             sources             tenants
//	  id          INTEGER key           id      INTEGER key   id    INTEGER key
//	  node_id     TEXT unique           source  TEXT unique   path  TEXT unique
//	  watermark   INTEGER
//	  head        BLOB hash of the record at the watermark
//	  last_push_ns INTEGER gateway clock
//
//	records
//	  seq         INTEGER key, order of arrival, never reused
//	  node        INTEGER -> nodes      \ unique
//	  node_seq    INTEGER               /
//	  id          TEXT                  \ unique; an id begins with "<sandbox>/", so
//	  source      INTEGER -> sources    / this index also finds a sandbox's records
//	  tenant      INTEGER -> tenants    \ index; a query names the tenants of a
//	  start_ns    INTEGER               / subtree, then seeks each one's interval
//	  ...                               the other fields of usage.v1.Record
//	  corrects    TEXT                  partial index; NULL if it corrects nothing
//	  ingested_ns INTEGER               gateway clock
//
//	conflicts
//	  seq         INTEGER key
//	  first_ns, last_ns, count          gateway clock; a repetition only counts
//	  node_id, kind, node_seq, source, record_id
//	  have_hash, got_hash               have_hash is NULL if the ledger has no such record
//	  record      BLOB                  the refused record, protobuf
//
// Triggers refuse to update or delete records, to delete anything else, and to
// move a watermark back.
//
// # Locks
//
// Lock order: Ledger.writer, then Ledger.mu.
package ledger
