// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/agent/admit"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/store"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/netpol"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	"github.com/bulkheadhq/bulkhead/runtime"
)

// TestCodes: the code of every error that a caller may have to tell apart.
func TestCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{&sandbox.SpecError{Field: "name", Msg: "is empty"}, codes.InvalidArgument},
		{&netpol.Error{File: "x", Line: 3, Msg: "no"}, codes.InvalidArgument},
		{runtime.ErrInvalidArchive, codes.InvalidArgument},
		{runtime.ErrInvalidSpec, codes.InvalidArgument},
		{runtime.ErrCommand, codes.InvalidArgument},
		{supervisor.ErrAmbiguous, codes.InvalidArgument},
		{&store.NameTakenError{Tenant: "acme", Name: "a", ID: "b"}, codes.AlreadyExists},
		{runtime.ErrExists, codes.AlreadyExists},
		{supervisor.ErrNotFound, codes.NotFound},
		{runtime.ErrImageNotFound, codes.NotFound},
		{&admit.Denied{Reason: admit.TenantUnknown, Tenant: "x"}, codes.NotFound},
		{&admit.Denied{Reason: admit.Quota, Resource: admit.CPU}, codes.ResourceExhausted},
		{&admit.Denied{Reason: admit.NodeCapacity, Resource: admit.Memory}, codes.ResourceExhausted},
		{&admit.Denied{Reason: admit.UsageSpool}, codes.ResourceExhausted},
		{store.ErrNoSlot, codes.ResourceExhausted},
		{runtime.ErrSlowReader, codes.ResourceExhausted},
		{supervisor.ErrNotStopped, codes.FailedPrecondition},
		{runtime.ErrNotRunning, codes.FailedPrecondition},
		{runtime.ErrNoAttach, codes.FailedPrecondition},
		{supervisor.ErrLeaving, codes.Unavailable},
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{fs.ErrPermission, codes.Internal},
		{status.Error(codes.PermissionDenied, "no"), codes.PermissionDenied},
	} {
		for _, err := range []error{c.err, fmt.Errorf("of something: %w", c.err), errors.Join(errors.New("first"), c.err)} {
			if c.err == nil {
				err = nil
			}
			if got := status.Code(failure(err)); got != c.want {
				t.Errorf("%v: got %s, want %s", err, got, c.want)
			}
		}
	}
	bad := failure(fmt.Errorf("path \xff: %w", fs.ErrNotExist))
	if got := status.Convert(bad).Message(); got != "path ?: file does not exist" {
		t.Errorf("a message that is not UTF-8: %q", got)
	}
}

// TestDenialCarriesItsNumbers: a client need not read the message.
func TestDenialCarriesItsNumbers(t *testing.T) {
	err := failure(&admit.Denied{
		Reason: admit.Quota, Resource: admit.Memory, Limit: 5, InUse: 4, Want: 3, Tenant: "acme/x", SetBy: "acme", File: "acme.yaml",
	})
	details := status.Convert(err).Details()
	if len(details) != 1 {
		t.Fatalf("details: %v", details)
	}
	d, ok := details[0].(*nodev1.Denial)
	if !ok || d.Reason != "quota" || d.Resource != "memory_bytes" || d.Limit != 5 || d.InUse != 4 || d.Want != 3 || d.SetBy != "acme" || d.File != "acme.yaml" {
		t.Errorf("got %v", details[0])
	}
}
