// SPDX-License-Identifier: Apache-2.0

// Package report ships the usage spool to the gateway.
//
// It owns the connection and nothing else: what has been acknowledged is the
// spool's to remember, and after a crash everything begins with asking the
// gateway for its watermark. A record leaves the spool only after the gateway
// has said that it is in the ledger. No record is ever skipped, whatever the
// gateway says about it.
//
// One session at a time:
//
//	dial -> Watermark -> compare with the spool -> Push, acknowledge, Push, ...
//	  ^                        |                        |
//	  |                     conflict <------------------+ refused for good
//	  |                        | every few minutes      |
//	  +------------------------+------------------------+ anything else: soon
//
// The comparison ends in a conflict, which a person has to look at, when the
// gateway's last record is not ours, when it has records that we never had, or
// when it lacks records that it once acknowledged and that are gone here. So
// does a record that the gateway refuses. In a conflict nothing is sent; the
// spool keeps everything and fills up.
//
// Lock order: only Reporter.mu.
package report

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/agent/spool"
)

// Config says where the gateway is and who we are.
type Config struct {
	// Target is unix:///path of a socket, or tcp://host:port, which means TLS.
	Target string
	// CAFile has the certificates that the gateway's must lead to; empty: the
	// system's. CertFile and KeyFile are this node's own; empty: it has none.
	// They are read again for each connection.
	CAFile, CertFile, KeyFile string
	NodeID                    string
	Log                       *slog.Logger // nil: none
}

// State of the reporter, in one word for people.
type State string

// The states.
const (
	Connecting   State = "connecting"   // no session has come to an end yet
	Connected    State = "connected"    // the gateway answers
	Disconnected State = "disconnected" // it does not; tried again within 30 s
	Conflict     State = "conflict"     // somebody has to look; tried again every few minutes
)

// Status is how the reporter stands.
type Status struct {
	State     State
	LastError string    // of the last session that ended; empty once records flow again
	Since     time.Time // when State began
	Watermark uint64    // what the gateway last said it has
	LastAck   time.Time // when it last acknowledged something; zero if never since the start
}

// ConflictError says that the gateway and the spool disagree about what was
// reported. From to To are the records that one of them lacks, 0 if the content
// is what differs.
type ConflictError struct {
	Reason   string
	From, To uint64
	Err      error // what the gateway said, nil if the reporter found out by itself
}

func (e *ConflictError) Error() string {
	if e.Err != nil {
		return e.Reason + ": " + e.Err.Error()
	}
	return e.Reason
}

func (e *ConflictError) Unwrap() error { return e.Err }

// pace holds every duration and bound, so that tests can be quick.
type pace struct {
	firstRetry  time.Duration
	lastRetry   time.Duration
	conflict    time.Duration // between sessions while in conflict
	answer      time.Duration // the longest wait for any answer of the gateway
	heartbeat   time.Duration // an idle session asks for the watermark so often
	batchCount  int
	batchBytes  int
	logInterval time.Duration // the same trouble is logged again so often
}

var defaultPace = pace{
	firstRetry:  100 * time.Millisecond,
	lastRetry:   30 * time.Second,
	conflict:    5 * time.Minute,
	answer:      30 * time.Second,
	heartbeat:   time.Minute,
	batchCount:  1000,
	batchBytes:  1 << 20,
	logInterval: time.Hour,
}

// Reporter ships one spool.
type Reporter struct {
	cfg   Config
	dial  target
	spool *spool.Spool
	log   *slog.Logger
	pace  pace

	mu     sync.Mutex
	status Status

	loggedAt time.Time // only Run's goroutine
}

// New checks the configuration, the files it names included. It does not
// connect.
func New(cfg Config, sp *spool.Spool) (*Reporter, error) {
	if cfg.NodeID == "" {
		return nil, errors.New("report usage: no node id")
	}
	t, err := parseTarget(cfg)
	if err != nil {
		return nil, err
	}
	if _, err := t.credentials(); err != nil {
		return nil, err
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Reporter{
		cfg: cfg, dial: t, spool: sp, log: log, pace: defaultPace,
		status: Status{State: Connecting, Since: time.Now()},
	}, nil
}

// Status never blocks on the network.
func (r *Reporter) Status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}

// Run ships until ctx ends, then answers nil. Trouble with the gateway or with
// the spool is in Status and in the log; it never ends Run, because sandboxes
// run on and are metered without a gateway.
func (r *Reporter) Run(ctx context.Context) error {
	failures := 0
	for {
		before := r.Status().LastAck
		err := r.session(ctx)
		select {
		case <-ctx.Done():
			return nil
		default:
		}
		if r.Status().LastAck != before {
			failures = 0 // it worked for a while
		}
		wait := r.pace.backoff(failures)
		failures++
		state := Disconnected
		if ce := conflictOf(err); ce != nil {
			state, err, wait = Conflict, ce, jitter(r.pace.conflict)
		}
		r.ended(state, err, wait)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// backoff doubles from the first to the longest wait, give or take a half, but
// never beyond the longest.
func (p pace) backoff(failures int) time.Duration {
	d := p.lastRetry
	if failures < 30 {
		d = min(p.firstRetry<<failures, p.lastRetry)
	}
	return min(jitter(d), p.lastRetry)
}

// jitter answers between a half and one and a half times d, so that the nodes
// of a site do not come back all at once.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d+1)
}

// conflictOf answers the conflict in an error, or nil. What the gateway refuses
// for good is one too: the record would be refused again, and must not be
// dropped.
func conflictOf(err error) *ConflictError {
	var ce *ConflictError
	if errors.As(err, &ce) {
		return ce
	}
	var damaged *spool.CorruptError
	if errors.As(err, &damaged) {
		return &ConflictError{Reason: "the spool cannot be read", Err: err}
	}
	switch status.Code(err) {
	case codes.FailedPrecondition:
		return &ConflictError{Reason: "the gateway has other records of this node", Err: err}
	case codes.InvalidArgument:
		return &ConflictError{Reason: "the gateway refuses a record", Err: err}
	}
	return nil
}

// agreed notes that gateway and spool fit together. With records still to go a
// conflict is not over: it may be the next one that the gateway refuses.
func (r *Reporter) agreed(watermark uint64, allSent bool) {
	if r.Status().State == Conflict && !allSent {
		return
	}
	r.connected(watermark, time.Time{})
}

// connected notes what the gateway has, and when it acknowledged it, if now.
func (r *Reporter) connected(watermark uint64, ack time.Time) {
	r.mu.Lock()
	was := r.status.State
	r.status.Watermark, r.status.LastError = watermark, ""
	if was != Connected {
		r.status.State, r.status.Since = Connected, time.Now()
	}
	if !ack.IsZero() {
		r.status.LastAck = ack
	}
	r.mu.Unlock()
	if was != Connected {
		r.log.Info("usage gateway answers", "gateway", r.cfg.Target, "watermark", watermark)
	}
}

// ended notes why a session ended, and says it when it is new.
func (r *Reporter) ended(state State, err error, wait time.Duration) {
	now := time.Now()
	r.mu.Lock()
	changed := r.status.State != state
	if changed {
		r.status.State, r.status.Since = state, now
	}
	r.status.LastError = err.Error()
	r.mu.Unlock()
	if !changed && now.Sub(r.loggedAt) < r.pace.logInterval {
		return
	}
	r.loggedAt = now
	if state == Conflict {
		r.log.Error("usage is not reported: the gateway and this node disagree; the spool keeps everything",
			"gateway", r.cfg.Target, "err", err, "retry", wait)
		return
	}
	r.log.Warn("usage gateway does not answer; usage stays in the spool", "gateway", r.cfg.Target, "err", err)
}

// missing says which records one side lacks.
func missing(from, to uint64, format string, args ...any) *ConflictError {
	return &ConflictError{Reason: fmt.Sprintf(format, args...), From: from, To: to}
}
