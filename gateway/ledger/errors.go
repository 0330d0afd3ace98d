// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"errors"
	"fmt"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// Questions that callers ask with [errors.Is].
var (
	ErrLocked      = errors.New("another gateway uses this directory")
	ErrNotLedger   = errors.New("not a usage ledger")
	ErrNewerSchema = errors.New("written by a newer gateway")
	ErrCorrupt     = errors.New("ledger is damaged")
	ErrFull        = errors.New("ledger disk is full")
	ErrBusy        = errors.New("ledger is locked by another program")
	ErrFailed      = errors.New("ledger takes no more records after an error")
	ErrInvalid     = errors.New("invalid batch")
	ErrGap         = errors.New("batch begins past the watermark")
	ErrConflict    = errors.New("record conflicts with the ledger")
	ErrTooMany     = errors.New("too many rows")
	ErrNoNode      = errors.New("no such node")
)

// GapError refuses a batch that begins past the node's watermark.
type GapError struct {
	Node  string
	First uint64 // node_seq that the batch begins with
	Mark  Mark   // send from Mark.Seq+1
}

func (e *GapError) Error() string {
	return fmt.Sprintf("batch of node %s begins at node_seq %d, want %d", e.Node, e.First, e.Mark.Seq+1)
}

// Is reports whether target is [ErrGap].
func (e *GapError) Is(target error) bool { return target == ErrGap }

// Kinds of conflict.
const (
	KindContent  = "content"  // the record's hash is not of its content
	KindChain    = "chain"    // its prev_hash is not the hash of the record before
	KindSequence = "sequence" // its node_seq is in the ledger with another content
	KindID       = "id"       // its id is in the ledger with another content
)

var kindText = map[string]string{
	KindContent:  "its hash is not the hash of its content",
	KindChain:    "it does not continue the node's hash chain",
	KindSequence: "its node_seq is in the ledger with another content",
	KindID:       "its id is in the ledger with another content",
}

// ConflictError refuses a batch because of one record. The conflict is in the
// ledger's conflicts table when the caller sees this error.
type ConflictError struct {
	Node     string
	Kind     string
	NodeSeq  uint64
	Source   string
	RecordID string
	Have     []byte // hash in the ledger; nil if there is none
	Got      []byte
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("record %s (node %s, node_seq %d): %s", e.RecordID, e.Node, e.NodeSeq, kindText[e.Kind])
}

// Is reports whether target is [ErrConflict].
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// classify gives an error of SQLite the sentinel that belongs to it.
func classify(err error) error {
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return err
	}
	switch code := e.Code(); {
	case code&0xff == sqlite3.SQLITE_FULL, code == sqlite3.SQLITE_IOERR_SHMSIZE:
		return fmt.Errorf("%w: %w", ErrFull, err)
	case code&0xff == sqlite3.SQLITE_BUSY, code&0xff == sqlite3.SQLITE_LOCKED:
		return fmt.Errorf("%w: %w", ErrBusy, err)
	case code&0xff == sqlite3.SQLITE_NOTADB:
		return fmt.Errorf("%w: %w", ErrNotLedger, err)
	case code&0xff == sqlite3.SQLITE_CORRUPT:
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return err
}
