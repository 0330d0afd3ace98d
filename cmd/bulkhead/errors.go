// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// explainError is err in one line for people.
func (c *cli) explainError(err error) string {
	var se interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &se) {
		return render.Clean(err.Error())
	}
	st := se.GRPCStatus()
	for _, d := range st.Details() {
		if denial, ok := d.(*nodev1.Denial); ok {
			return c.explainDenial(denial, st.Message())
		}
	}
	if st.Code() == codes.Unavailable {
		if d := c.dialErr.Load(); d != nil {
			return explainDial(d)
		}
		if _, alert, ok := strings.Cut(st.Message(), "remote error: tls: "); ok {
			return fmt.Sprintf("the %s does not accept the client certificate: %s", c.to, strings.Trim(alert, `"`))
		}
		if broken(st.Message()) && !c.to.unix {
			// Its alert may be lost behind what we were still writing.
			return fmt.Sprintf("the %s closed the connection before it answered (it may want another client certificate)", c.to)
		}
		if broken(st.Message()) {
			return fmt.Sprintf("the %s went away before it answered (systemctl status bulkhead-%s)", c.to, c.to.name)
		}
	}
	msg := render.Clean(st.Message())
	switch st.Code() {
	case codes.Unimplemented:
		return fmt.Sprintf("the %s is of another version and does not know this request (bulkhead version)", c.to)
	case codes.DeadlineExceeded, codes.Canceled:
		if errors.Is(err, context.Canceled) || msg == "" {
			return "interrupted"
		}
	}
	if msg == "" {
		return fmt.Sprintf("the %s answers %s without a reason", c.to, strings.ToLower(st.Code().String()))
	}
	return msg
}

// broken says whether msg is gRPC's own about a lost connection, and not the
// agent's.
func broken(msg string) bool {
	return strings.HasPrefix(msg, "error reading from server") || strings.Contains(msg, "transport is closing") ||
		strings.HasPrefix(msg, "connection error") || strings.HasSuffix(msg, "broken pipe") ||
		strings.HasSuffix(msg, "connection reset by peer") || strings.Contains(msg, "the connection is draining")
}

// explainDenial says what was wanted, what is in use and whose limit it is.
func (c *cli) explainDenial(d *nodev1.Denial, msg string) string {
	where := ""
	if d.GetSetBy() != "" {
		where = "set by " + d.GetSetBy()
		if d.GetFile() != "" {
			where += " in " + d.GetFile()
		}
	}
	if d.GetReason() == "publish_port" {
		return render.Clean(msg) // it says whose range it is
	}
	if d.GetResource() == "" {
		if msg == "" {
			msg = "refused: " + strings.ReplaceAll(d.GetReason(), "_", " ")
		}
		if where != "" && !strings.Contains(msg, where) {
			msg += " (rule " + where + ")"
		}
		return render.Clean(msg)
	}
	who, limit := c.asTenant, "limit "+where
	if who == "" {
		who = "this sandbox"
	}
	if d.GetReason() == "node_capacity" || d.GetSetBy() == "node" {
		who += " on this node"
		limit = "all that the node has"
	}
	amount := func(n int64) string { return render.Quantity(d.GetResource(), n) }
	return render.Clean(fmt.Sprintf("no room for %s: %s %s wanted, %s of %s in use (%s)", who,
		render.Resource(d.GetResource()), amount(d.GetWant()), amount(d.GetInUse()), amount(d.GetLimit()), limit))
}

func explainDial(d *dialError) string {
	if !d.to.unix {
		return fmt.Sprintf("no %s: %s", d.to, cause(d.err))
	}
	ask := fmt.Sprintf("is bulkhead-%s running? (systemctl status bulkhead-%[1]s)", d.to.name)
	switch {
	case errors.Is(d.err, fs.ErrNotExist):
		return fmt.Sprintf("no %s: %s", d.to, ask)
	case errors.Is(d.err, syscall.ECONNREFUSED):
		if fi, err := os.Stat(d.to.addr); err == nil && fi.Mode().Type() != fs.ModeSocket {
			return fmt.Sprintf("no %s: that is no socket", d.to)
		}
		return fmt.Sprintf("no %s: the socket is there but nobody answers; %s", d.to, ask)
	case errors.Is(d.err, fs.ErrPermission):
		return fmt.Sprintf("not allowed to use %s: %s", d.to.addr, whoMay(d.to.addr))
	}
	return fmt.Sprintf("no %s: %s", d.to, cause(d.err))
}

// cause is the innermost error, which is the one people can act on.
func cause(err error) string {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err.Error()
		}
		err = next
	}
}

// whoMay says whose socket it is and who is asking.
func whoMay(path string) string {
	me := fmt.Sprintf("you are uid %d", os.Geteuid())
	fi, err := os.Stat(path)
	if err != nil {
		path = filepath.Dir(path)
		if fi, err = os.Stat(path); err != nil {
			return me + ", and " + path + " is closed to you"
		}
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return me
	}
	return fmt.Sprintf("%s and need to be %s or in group %s (%s has mode %04o)", me,
		userName(st.Uid), groupName(st.Gid), path, fi.Mode().Perm())
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return "uid " + id
}

func groupName(gid uint32) string {
	id := strconv.FormatUint(uint64(gid), 10)
	if g, err := user.LookupGroupId(id); err == nil {
		return g.Name
	}
	return "gid " + id
}
