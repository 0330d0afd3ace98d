// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"testing"

	"github.com/bulkheadhq/bulkhead/runtime"
	"github.com/bulkheadhq/bulkhead/runtime/runtimetest"
)

func TestConforms(t *testing.T) {
	daemon(t)
	runtimetest.Run(t, func(t *testing.T) runtime.Runtime { return openRuntime(t) })
}
