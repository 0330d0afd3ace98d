// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
	_ "modernc.org/sqlite" // the driver named "sqlite"
)

// MaxRecords is the most records that one batch may have.
const MaxRecords = 1000

// Config says where the ledger is.
type Config struct {
	Dir string

	// Fault is called at named points of a commit: "begin" before anything is
	// written, "commit" when everything is but nothing is on the disk for
	// certain, "committed" when it is and nobody was told. An error makes that
	// step fail. Tests set it; nil otherwise.
	Fault func(point string) error
}

// Mark is how far a node's records have arrived.
type Mark struct {
	Seq  uint64 // last contiguous node_seq, 0 for none
	Hash []byte // of that record; zeros for none
}

// Ledger is the one writer of a ledger directory. It is safe for concurrent use.
type Ledger struct {
	*Reader
	fault func(string) error
	lock  *os.File

	// writer is held by the goroutine that commits for all that wait.
	writer sync.Mutex
	db     *sql.DB
	conn   *sql.Conn // +checklocks:writer
	stmts  statements
	broken error // +checklocks:writer

	// failed is closed, with broken set, by the first error that is not
	// a refusal and not a full disk.
	failed chan struct{}

	mu    sync.Mutex
	queue []*batch // +checklocks:mu
}

// Open opens the ledger in cfg.Dir, or makes it. The directory must exist.
//
// Errors: [ErrLocked], [ErrNewerSchema], [ErrNotLedger], [ErrCorrupt].
func Open(cfg Config) (_ *Ledger, err error) {
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	l := &Ledger{lock: lock, fault: cfg.Fault, failed: make(chan struct{})}
	if l.fault == nil {
		l.fault = func(string) error { return nil }
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	path := filepath.Join(cfg.Dir, fileName)
	if err := l.openWriter(path); err != nil {
		return nil, fmt.Errorf("open ledger %s: %w", path, classify(err))
	}
	if l.Reader, err = OpenReader(cfg.Dir); err != nil {
		return nil, err
	}
	if err := l.checkHeads(context.Background()); err != nil {
		return nil, fmt.Errorf("open ledger %s: %w", path, err)
	}
	return l, nil
}

const fileName = "ledger.db"

func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", f.Name(), ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, nil
}

func dsn(path, mode string, pragmas ...string) string {
	q := url.Values{"mode": {mode}}
	for _, p := range pragmas {
		q.Add("_pragma", p)
	}
	return (&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String()
}

func (l *Ledger) openWriter(path string) error {
	ctx := context.Background()
	db, err := sql.Open("sqlite", dsn(path, "rwc",
		"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)",
		"foreign_keys(1)", "recursive_triggers(1)",
		"cache_size(-65536)", "wal_autocheckpoint(4000)", "journal_size_limit(67108864)"))
	if err != nil {
		return err
	}
	l.db = db
	db.SetMaxOpenConns(1)
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	l.conn = conn
	// Both pragmas fall back silently where the file system lacks something.
	var mode string
	var sync int
	row := conn.QueryRowContext(ctx, "SELECT (SELECT journal_mode FROM pragma_journal_mode), (SELECT synchronous FROM pragma_synchronous)")
	if err := row.Scan(&mode, &sync); err != nil {
		return err
	}
	if mode != "wal" || sync != 2 {
		return fmt.Errorf("journal_mode is %s and synchronous %d, want wal and 2: the file system cannot hold a ledger", mode, sync)
	}
	if err := migrate(ctx, conn); err != nil {
		return err
	}
	return l.stmts.prepare(ctx, conn)
}

// Failed is closed when the ledger takes no more records; Err says why.
func (l *Ledger) Failed() <-chan struct{} { return l.failed }

// Err is nil until Failed is closed.
func (l *Ledger) Err() error {
	l.writer.Lock()
	defer l.writer.Unlock()
	return l.broken
}

// Close waits for the commit under way, moves the WAL into the database and
// lets go of the directory. Append must not be called any more.
func (l *Ledger) Close() error {
	l.writer.Lock()
	defer l.writer.Unlock()
	var errs []error
	if l.Reader != nil {
		errs = append(errs, l.Reader.Close())
	}
	l.stmts.close()
	if l.conn != nil {
		errs = append(errs, l.conn.Close())
		l.conn = nil
	}
	if l.db != nil {
		errs = append(errs, l.db.Close())
	}
	errs = append(errs, l.lock.Close())
	return errors.Join(errs...)
}

// statements are prepared once on the writer's connection.
type statements struct {
	node, addNode, setNode         *sql.Stmt
	known, byID, corrected         *sql.Stmt
	source, addSource              *sql.Stmt
	tenant, addTenant              *sql.Stmt
	insert, conflict               *sql.Stmt
	savepoint, rollbackTo, release *sql.Stmt
	begin, commit, rollback        *sql.Stmt
	all                            []*sql.Stmt
}

func (s *statements) prepare(ctx context.Context, conn *sql.Conn) error {
	for _, p := range []struct {
		stmt **sql.Stmt
		text string
	}{
		{&s.begin, `BEGIN IMMEDIATE`},
		{&s.commit, `COMMIT`},
		{&s.rollback, `ROLLBACK`},
		{&s.savepoint, `SAVEPOINT batch`},
		{&s.rollbackTo, `ROLLBACK TO batch`},
		{&s.release, `RELEASE batch`},
		{&s.node, `SELECT id, watermark, head FROM nodes WHERE node_id = ?`},
		{&s.addNode, `INSERT INTO nodes(node_id, watermark, head, last_push_ns) VALUES (?, 0, ?, ?)`},
		{&s.setNode, `UPDATE nodes SET watermark = ?, head = ?, last_push_ns = ? WHERE id = ?`},
		{&s.known, `SELECT hash FROM records WHERE node = ? AND node_seq = ?`},
		{&s.byID, `SELECT hash FROM records WHERE id = ? AND source = ?`},
		{&s.corrected, `SELECT EXISTS (SELECT 1 FROM records WHERE id = ? AND node = ?)`},
		{&s.source, `SELECT id FROM sources WHERE source = ?`},
		{&s.addSource, `INSERT INTO sources(source) VALUES (?)`},
		{&s.tenant, `SELECT id FROM tenants WHERE path = ?`},
		{&s.addTenant, `INSERT INTO tenants(path) VALUES (?)`},
		{&s.insert, `INSERT INTO records(node, node_seq, id, source, prev_hash, hash, tenant, sandbox, sandbox_name,
		  workload_ref, policy_rev, meter, start_ns, end_ns, mono_ns, delta, cumulative,
		  gpu_uuid, mig_uuid, profile, fraction_num, fraction_den, quality, corrects, ingested_ns)
		  VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT(id, source) DO NOTHING`},
		{&s.conflict, `INSERT INTO conflicts(first_ns, last_ns, count, node_id, kind, node_seq, source, record_id,
		  have_hash, got_hash, record) VALUES (?1, ?1, 1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
		  ON CONFLICT(node_id, node_seq, kind, got_hash)
		  DO UPDATE SET count = count + 1, last_ns = excluded.last_ns`},
	} {
		stmt, err := conn.PrepareContext(ctx, p.text) //nolint:sqlclosecheck // close does, for all of them
		if err != nil {
			return fmt.Errorf("prepare %q: %w", p.text, err)
		}
		*p.stmt = stmt
		s.all = append(s.all, stmt)
	}
	return nil
}

func (s *statements) close() {
	for _, stmt := range s.all {
		_ = stmt.Close() // the connection goes with it
	}
}
