// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	usagev1 "github.com/bulkheadhq/bulkhead/proto/usage/v1"
)

// session is one connection, from dial to the first error. It never answers nil
// before ctx ends.
func (r *Reporter) session(ctx context.Context) error {
	conn, err := r.dial.connect()
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	client := usagev1.NewUsageClient(conn)
	next, err := r.agree(ctx, client)
	if err != nil {
		return err
	}
	stream, err := client.Push(ctx)
	if err != nil {
		return fmt.Errorf("open usage stream: %w", err)
	}
	p := &pusher{r: r, client: client, stream: stream, answers: make(chan answer)}
	go p.receive(ctx)
	return p.push(ctx, next)
}

// agree compares the gateway's watermark with the spool and answers which
// record goes next.
func (r *Reporter) agree(ctx context.Context, client usagev1.UsageClient) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, r.pace.answer)
	defer cancel()
	w, err := client.Watermark(ctx, &usagev1.WatermarkRequest{NodeId: r.cfg.NodeID})
	if err != nil {
		return 0, fmt.Errorf("ask for usage watermark: %w", err)
	}
	mark, st := w.GetNodeSeq(), r.spool.Status()
	switch {
	case mark > st.Last:
		return 0, missing(st.Last+1, mark,
			"the gateway has usage records %d to %d of node %s, which this node never made: its state was lost or put back, or another node has its id",
			st.Last+1, mark, r.cfg.NodeID)
	case mark+1 < st.First:
		return 0, missing(mark+1, st.First-1,
			"the gateway has lost usage records %d to %d of node %s, which it had acknowledged and which are gone here: put its ledger back from a backup",
			mark+1, st.First-1, r.cfg.NodeID)
	}
	hash, err := r.spool.HashAt(mark)
	if err != nil {
		return 0, err
	}
	if mark > 0 && !bytes.Equal(hash, w.GetHash()) {
		return 0, &ConflictError{Reason: fmt.Sprintf(
			"the gateway's usage record %d of node %s is another than the one made here", mark, r.cfg.NodeID)}
	}
	if mark > st.Acked {
		if err := r.spool.Ack(mark); err != nil {
			return 0, err
		}
	} else if mark < st.Acked {
		r.log.Warn("the gateway lacks usage records that it had acknowledged; they are sent again",
			"from", mark+1, "to", st.Acked)
	}
	r.agreed(mark, mark == st.Last)
	return mark + 1, nil
}

// answer is what the stream delivers.
type answer struct {
	seq uint64
	err error
}

// pusher drives one Push stream. One batch is in flight at a time.
type pusher struct {
	r       *Reporter
	client  usagev1.UsageClient
	stream  grpc.BidiStreamingClient[usagev1.PushRequest, usagev1.PushResponse]
	answers chan answer // never closed; receive gives up with the session's context
}

func (p *pusher) receive(ctx context.Context) {
	for {
		resp, err := p.stream.Recv()
		select {
		case p.answers <- answer{seq: resp.GetNodeSeq(), err: err}:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

func (p *pusher) push(ctx context.Context, next uint64) error {
	for {
		// Before the read: what comes later wakes us.
		changed := p.r.spool.Changed()
		batch, err := p.r.batch(next)
		if err != nil {
			return err
		}
		if len(batch) == 0 {
			if err := p.idle(ctx, changed, next); err != nil {
				return err
			}
			continue
		}
		seq, err := p.exchange(ctx, batch)
		if err != nil {
			return err
		}
		if seq < next {
			return fmt.Errorf("the gateway answers watermark %d to usage records %d to %d: it takes none",
				seq, next, batch[len(batch)-1].NodeSeq)
		}
		// It may know of more than this batch: one that an earlier session gave up
		// waiting for. It cannot know of more than there is.
		if last := p.r.spool.Status().Last; seq > last {
			return missing(last+1, seq, "the gateway acknowledges usage record %d of node %s, which has made only %d", seq, p.r.cfg.NodeID, last)
		}
		if err := p.r.spool.Ack(seq); err != nil {
			return err
		}
		p.r.connected(seq, time.Now())
		next = seq + 1
	}
}

// batch reads what goes next, at least one record if there is any.
func (r *Reporter) batch(next uint64) ([]*usagev1.Record, error) {
	recs, err := r.spool.Read(next, r.pace.batchCount)
	if err != nil {
		return nil, err
	}
	size := 0
	for i, rec := range recs {
		size += proto.Size(rec) + 8 // and its tag and length
		if i > 0 && size > r.pace.batchBytes {
			return recs[:i], nil
		}
	}
	return recs, nil
}

// exchange sends one batch and waits for its answer.
func (p *pusher) exchange(ctx context.Context, batch []*usagev1.Record) (uint64, error) {
	sent := make(chan struct{}) // closed when the send is over
	go func() {
		// Why a send fails is what the receiver is told.
		_ = p.stream.Send(&usagev1.PushRequest{NodeId: p.r.cfg.NodeID, Records: batch})
		close(sent)
	}()
	timeout := time.NewTimer(p.r.pace.answer)
	defer timeout.Stop()
	first, last := batch[0].NodeSeq, batch[len(batch)-1].NodeSeq
	for got := uint64(0); ; {
		select {
		case <-sent:
			if sent = nil; got > 0 {
				return got, nil
			}
		case a := <-p.answers:
			if a.err != nil {
				return 0, fmt.Errorf("push usage records %d to %d: %w", first, last, a.err)
			}
			if got = a.seq; sent == nil || got == 0 {
				return got, nil
			}
		case <-timeout.C:
			return 0, fmt.Errorf("push usage records %d to %d: no answer in %s", first, last, p.r.pace.answer)
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// idle waits for records. From time to time it asks whether the gateway is
// still there and still has what it acknowledged.
func (p *pusher) idle(ctx context.Context, changed <-chan struct{}, next uint64) error {
	beat := time.NewTimer(p.r.pace.heartbeat)
	defer beat.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
			return nil
		case a := <-p.answers:
			if a.err != nil {
				return fmt.Errorf("usage stream: %w", a.err)
			}
			return fmt.Errorf("usage stream: the gateway answers %d and was not asked", a.seq)
		case <-beat.C:
			mark, err := p.r.agree(ctx, p.client)
			if err != nil {
				return err
			}
			if mark != next {
				return fmt.Errorf("the gateway's usage watermark went from %d to %d", next-1, mark-1)
			}
			beat.Reset(p.r.pace.heartbeat)
		}
	}
}
